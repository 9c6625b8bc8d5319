"""Stop strings: texts that end an answer and do not appear in it."""

from collections.abc import Sequence

from ds4mlx.errors import DataError


class StopStrings:
    """Holds back text that may be the beginning of a stop string; cuts at the first to be complete.

    Of two that end together the longer one counts, so the pieces that text comes in do not matter.
    """

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise DataError("a stop string is empty")
        self.stops = list(stops)
        self.found = False
        self._held = ""

    def add(self, text: str) -> str:
        """Take more text; return what is safe to show."""
        self._held += text
        places = [(self._held.find(stop), len(stop)) for stop in self.stops]
        ends = [(start + length, start) for start, length in places if start >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back in vain."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
