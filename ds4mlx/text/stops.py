"""Stop strings: texts that end an answer and do not appear in it."""

from collections.abc import Sequence

from ds4mlx.errors import DataError


class StopStrings:
    """Keeps back text that may be the beginning of a stop string; cuts at the first to be complete.

    Of two that end together the longer one counts, so the pieces that text comes in do not matter.
    `found` is that one, None until then.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(isinstance(stop, str) for stop in stops):
            raise DataError("a stop string is not text")
        if not all(stops):
            raise DataError("a stop string is empty")
        self.stops = list(stops)
        self.found: str | None = None
        self._waiting = ""

    @property
    def reached(self) -> bool:
        """Whether a stop string is complete."""
        return self.found is not None

    def add(self, text: str) -> str:
        """Take more text; return what is safe to show."""
        self._waiting += text
        places = [(self._waiting.find(stop), stop) for stop in self.stops]
        ends = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if ends:
            _, start, self.found = min(ends)
            shown, self._waiting = self._waiting[:start], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._waiting) - keep
        shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return shown

    def finish(self) -> str:
        """What was kept back in vain."""
        shown, self._waiting = self._waiting, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the waiting text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._waiting))
        return next((n for n in range(longest, 0, -1) if self._waiting.endswith(stop[:n])), 0)
