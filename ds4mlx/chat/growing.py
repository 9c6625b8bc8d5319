"""A completion's text while it grows: what of it is safe to show, and where calls open in it.

Says only what no later text can change; what it cannot say yet is held back.
"""

import re

from ds4mlx.chat import spelling
from ds4mlx.chat.tokens import CONTROL, CONTROL_TOKEN, EOS

# A tag longer than this is not waited for: what follows it comes with the end of the text.
LONGEST_TAG = 4096

_CALLS = ("invoke", "toolcall", "tool_call", "functioncall", "function_call")
_OPENINGS = tuple(f"<{mark}{word}" for mark in ("", "DSML") for word in _CALLS)
_BEGINNING = re.compile(r"<\s*/?[\s｜|]*\w*[\s｜|]*\w*\s*>?")
_DECORATION = re.compile(r"[\s｜|]")
# Behind a tag stands enough to tell whether it opens something.
_DECIDED = re.compile(r"<[^<>]*(?:<|>\s*(?:[^<\s]|<[^<>]*[<>]))")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)


def begins(text: str, at: int, words: tuple[str, ...]) -> bool | None:
    """Whether one of the tags begins at text[at], a `<`; None where the text ends too soon.

    words: the tags without white space and bars, which are passed over in the text.
    """
    found = _BEGINNING.match(text, at)
    assert found is not None
    bare = _DECORATION.sub("", found[0])
    if found.end() == len(text) and any(word.startswith(bare) for word in words):
        return None
    return bare.startswith(words)


def is_decided(text: str, at: int) -> bool:
    """Whether the tag at text[at] is complete, and what follows says whether it is meant."""
    return _DECIDED.match(text, at) is not None


class Prose:
    """Text outside calls, which grows until one of the tokens `ends`, or until calls open.

    ended: the token that ended it. opening: where calls open, `level` in which spelling, or what
    may be calls for all that can be told before the text's end. rest: the text from there on,
    behind the token. Control tokens are left out of what is shown, and up to two line feeds
    are held back, which belong to the calls if some follow.
    """

    def __init__(self, ends: tuple[str, ...]):
        self.text = ""
        self.ended = ""
        self.opening: int | None = None
        self.level = spelling.PLAIN
        self._ends = ends
        self._at = self._shown = 0
        self._is_watched = True
        self._fences = self._fences_to = 0

    @property
    def rest(self) -> str:
        return self.text[self._at :]

    def add(self, text: str) -> str:
        """Take more text; returns what can be shown."""
        self.text += text
        while not self.ended and self.opening is None and self._pass():
            pass
        end = self._at - len(self.ended)
        if not self.ended or self.ended == EOS:
            end = self._before_line_feeds(end)
        shown, self._shown = self.text[self._shown : end], max(self._shown, end)
        return CONTROL_TOKEN.sub("", shown)

    def talk(self) -> None:
        """What opens here is only talked about, and so is all that follows."""
        self._is_watched, self.opening = False, None

    def _before_line_feeds(self, end: int) -> int:
        first = max(self._shown, end - 2)
        return first + len(self.text[first:end].rstrip("\n"))

    def _pass(self) -> bool:
        """On to behind the next `<`; whether there may be more to pass."""
        start = self.text.find("<", self._at)
        if start < 0:
            self._at = len(self.text)
            return False
        self._at = start
        token = next((token for token in CONTROL if self.text.startswith(token, start)), None)
        if token:
            self._at += len(token)
            self.ended = token if token in self._ends else ""
            return True
        opens = self._opens(start)
        if opens is None and len(self.text) - start > LONGEST_TAG:
            opens = True
        if opens:
            self.opening = start
        if opens is False:
            self._at += 1
        return opens is False

    def _opens(self, at: int) -> bool | None:
        """Whether calls open at `at`, or a token does of which more must come: None."""
        beginning = self.text[at : at + LONGEST_TAG]
        if any(token.startswith(beginning) for token in CONTROL):
            return None
        found = begins(self.text, at, _OPENINGS) if self._is_watched else False
        if not found:
            return found
        if not is_decided(self.text, at):
            return None
        level = spelling.opens(self.text, at)
        self.level = spelling.PLAIN if level is None else level
        return level is not None and (level != spelling.PLAIN or self._on_its_own(at))

    def _on_its_own(self, at: int) -> bool:
        """Whether a plain tag stands at the start of a line outside code."""
        self._fences += len(_FENCE.findall(self.text, self._fences_to, at))
        self._fences_to = at
        before = self.text[max(0, at - LONGEST_TAG) : at]
        return self._fences % 2 == 0 and _own_line(before)


def _own_line(before: str) -> bool:
    return not before.rpartition("\n")[2].strip()
