"""Official tool calls read while they are written: name first, then the arguments as they come.

Follows one way only, of calls that follow each other in a block. What strays from it is waited
for: the whole text is read once it is there.
"""

import json
import re
from collections.abc import Callable

from ds4mlx.chat import spelling
from ds4mlx.chat.deltas import CallArguments, CallEnd, CallStart, Delta
from ds4mlx.chat.growing import LONGEST_TAG, begins, is_decided
from ds4mlx.chat.markup import Parameter, argument, new_id
from ds4mlx.chat.reading import read_call
from ds4mlx.chat.tokens import DSML

_CLOSE = f"</{DSML}parameter>"
_CLOSINGS = ("</parameter>", "</DSMLparameter>")
_OPENINGS = ("<DSMLinvoke", "<DSMLparameter")
_LONGEST_KEY = 320  # a key with quotes in it, and string= behind it
_CALL_CLOSE = re.compile(rf"<\s*/\s*{DSML}\s*invoke\s*>")
_BRACE = re.compile(r"\s*\{")


class CallReader:
    """The calls at text[start:], in the official spelling.

    ids: those of the calls that are complete. open: the delta that began a call which is not.
    given: its arguments so far. broken: whether a call that was begun can no longer be completed.
    """

    def __init__(self, text: str, start: int):
        self.text = text
        self.ids: list[str] = []
        self.open: CallStart | None = None
        self.given = ""
        self.broken = False
        opening = spelling.BLOCK.match(text, start)
        self._at = opening.end() if opening else start
        self._step: Callable[[], bool] = self._read_head
        self._deltas: list[Delta] = []
        # Before the first official closing tag, laxer ones may turn out to be meant.
        self._closes_officially = False

    @property
    def is_cut(self) -> bool:
        """Whether a call is open to which nothing is missing but more text."""
        at = self._seek if self._step == self._read_value else self._at
        return self.open is not None and self._step != self._stray and ">" not in self.text[at:]

    def add(self, text: str) -> list[Delta]:
        """Take more text; returns what it adds to the calls."""
        self.text += text
        while self._step():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read_head(self) -> bool:
        head = spelling.call_at(self.text, self._at)
        if head is None:
            return self._wait()
        self._head, self._call_at, self._at = head, self._at, head.end
        self._step = self._read_body
        return True

    def _read_body(self) -> bool:
        """A parameter's opening tag or the call's closing one; JSON only directly behind the head."""
        if opening := spelling.parameter_at(self.text, self._at):
            if opening.is_string is None and not self._has_whole_key(opening.end):
                return False
            self._begin_value(opening)
        elif end := spelling.CALL_END.match(self.text, self._at):
            self._begin_call()
            self._give("}" if self.given else "{}")
            self._end_call(end.end())
        elif self._at == self._head.end and _BRACE.match(self.text, self._at):
            self._seek, self._step = self._at, self._read_json
        else:
            return self._wait()
        return True

    def _has_whole_key(self, end: int) -> bool:
        """Whether string= cannot follow any more, which would make all before it the key."""
        reach = end + _LONGEST_KEY
        return len(self.text) >= reach or self.text.find(_CLOSE, end, reach) >= 0

    def _read_json(self) -> bool:
        close = _CALL_CLOSE.search(self.text, self._seek)
        if close is None:
            self._seek = max(self._seek, len(self.text) - LONGEST_TAG)
            return False
        reading = read_call(
            self.text[: close.end()], self._call_at, spelling.OFFICIAL, spelling.OFFICIAL
        )
        if reading.call is None:
            return self._give_up()
        self._begin_call()
        values = {p.key: argument(p) for p in reading.call.parameters}
        self._give("{" + ", ".join(f"{_quoted(key)}: {values[key]}" for key in values) + "}")
        self._end_call(reading.end)
        return True

    def _begin_call(self) -> None:
        if self.open is None:
            self.open = CallStart(len(self.ids), new_id(), self._head.name)
            self._deltas.append(self.open)

    def _begin_value(self, opening: spelling.Opening) -> None:
        self._begin_call()
        self._parameter, self._at, self._seek = opening, opening.end, opening.end
        self._is_streamed = opening.is_string is True
        self._give(f"{', ' if self.given else '{'}{_quoted(opening.name)}: ")
        if self._is_streamed:
            self._give('"')
        self._step = self._read_value

    def _read_value(self) -> bool:
        """On to the value's closing tag, or to what else may end it."""
        while (tag := self.text.find("<", self._seek)) >= 0:
            self._seek = tag
            if self.text.startswith(_CLOSE, tag):
                self._end_value()
                return True
            if not self._is_text(tag):
                break
            self._seek = tag + 1
        else:
            self._seek = len(self.text)
        if self._is_streamed and self.open is not None:
            self._show(self._seek)
        return False

    def _is_text(self, tag: int) -> bool:
        """Whether the `<` is the value's own; else wait there, or for ever."""
        closing = begins(self.text, tag, _CLOSINGS)
        opening = begins(self.text, tag, _OPENINGS)
        if closing is None or opening is None or (opening and not is_decided(self.text, tag)):
            return False
        if opening and spelling.ends_value(self.text, tag, spelling.OFFICIAL):
            self._break_off()
            return False
        if closing and not self._closes_officially and _is_any_close(self.text, tag):
            if self._is_streamed:
                self._show(tag)
            self._is_streamed = False
        return True

    def _end_value(self) -> None:
        end, self._closes_officially = self._seek, True
        kind = self._parameter.is_string
        if kind:
            self._show(end)
            self._give('"')
        else:
            value = self.text[self._parameter.end : end]
            self._give(argument(Parameter(self._parameter.name, value, kind is not False)))
        self._at = end + len(_CLOSE)
        self._step = self._read_body

    def _show(self, end: int) -> None:
        """Give a text's next characters."""
        self._give(_quoted(self.text[self._at : end])[1:-1])
        self._at = end

    def _give(self, text: str) -> None:
        assert self.open is not None
        self.given += text
        self._deltas.append(CallArguments(self.open.index, text))

    def _end_call(self, end: int) -> None:
        assert self.open is not None
        self._deltas.append(CallEnd(self.open.index))
        self.ids.append(self.open.id)
        self.open, self.given, self._at = None, "", end
        self._step = self._read_head

    def _break_off(self) -> None:
        """A tag opens inside a value; only laxer closing tags could still save the call."""
        if self._closes_officially and self.open is not None:
            self._deltas.append(CallEnd(self.open.index, broken=True))
            self.open, self.broken = None, True
        self._give_up()

    def _wait(self) -> bool:
        if len(self.text) - self._at > LONGEST_TAG:
            self._give_up()
        return False

    def _give_up(self) -> bool:
        self._step = self._stray
        return False

    def _stray(self) -> bool:
        return False


def _is_any_close(text: str, at: int) -> bool:
    return any(spelling.is_close(text, at, close) for close in (spelling.MARKED, spelling.PLAIN))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
