"""Whether calls written inside the reasoning may still turn out to be the turn's calls.

They are if the turn ends with them. Until that is out of the question nothing behind them is
certain.
"""

import re

from ds4mlx.chat import spelling
from ds4mlx.chat.calls import find_calls
from ds4mlx.chat.tokens import DSML, THINK_END

_BLANK_END = rf"\s*{re.escape(THINK_END)}\s*"
# The block is closed, and the turn goes on with something else than its end.
_GOES_ON = re.compile(
    rf"</{DSML}tool_calls>(?:{_BLANK_END}(?:[^<\s]|<[^｜]|<｜[^e])|\s*[^<\s])",
)


class Doubt:
    """About the calls that open at text[opening:] of a reasoning, in the spelling `level`."""

    def __init__(self, opening: int, level: int):
        self._opening, self._level = opening, level
        self._seek = opening
        self._is_tried = False

    def is_over(self, text: str) -> bool:
        """Whether they certainly do not end the turn; `text` is all there is so far."""
        if self._is_tried:
            return False
        if self._level == spelling.OFFICIAL:
            found = _GOES_ON.search(text, self._seek)
            self._seek = max(self._opening, len(text) - 256)
            return found is not None and self._is_closed(text[self._opening : found.end()])
        end = text.find(THINK_END, self._opening)
        self._is_tried = end >= 0
        return self._is_tried and "DSML" not in text[:end]

    def _is_closed(self, piece: str) -> bool:
        """Whether the block in `piece` ends before its last words, whatever follows them.

        Without an official closing tag of a value, a later one could make all of this a value.
        """
        self._is_tried = True
        block = find_calls(piece)
        is_final = f"</{DSML}parameter>" in piece or "parameter" not in piece
        is_first = block is not None and block.start == 0 and block.has_closing
        return is_final and is_first and block is not None and bool(piece[block.end :].strip())
