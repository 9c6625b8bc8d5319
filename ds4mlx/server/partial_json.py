"""The text in the JSON of a custom tool's call, as far as it has come."""

import json
import re

_KEY = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*(")')
# The end of a text that is half an escape, or half a pair of surrogates.
_CUT = re.compile(
    r"(?<!\\)(?:\\\\)*"
    r"(\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?)\Z"
)


class InputReader:
    """Reads `{"input": "..."}` in fragments; of anything else the JSON is the text."""

    def __init__(self) -> None:
        self.text = ""
        self._raw: list[str] = []
        self._rest = ""
        self._is_open: bool | None = None

    def add(self, fragment: str) -> str:
        """The text that this fragment adds."""
        self._raw.append(fragment)
        self._rest += fragment
        if self._is_open is None and (key := _KEY.match(self._rest)):
            self._rest, self._is_open = self._rest[key.end() :], True
        return self._told(self._unescaped()) if self._is_open else ""

    def finish(self) -> str:
        """The text that is told only at the end of the call; `text` is whole after it."""
        return "" if self.text else self._told(self._whole("".join(self._raw)))

    def _told(self, text: str) -> str:
        self.text += text
        return text

    def _whole(self, raw: str) -> str:
        try:
            value = json.loads(raw)
        except ValueError:
            return ""
        is_usual = isinstance(value, dict) and isinstance(value.get("input"), str)
        return value["input"] if is_usual else raw

    def _unescaped(self) -> str:
        end, cut = _QUOTE.search(self._rest), _CUT.search(self._rest)
        place = end or cut
        at = place.start(1) if place else len(self._rest)
        text, self._rest, self._is_open = self._rest[:at], self._rest[at:], end is None
        return json.loads(f'"{text}"', strict=False)
