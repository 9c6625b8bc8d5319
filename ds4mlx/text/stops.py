"""Stop strings: texts that end an answer and do not appear in it."""

from collections.abc import Sequence

from ds4mlx.errors import DataError


class StopStrings:
    """Keeps back text that may be the beginning of a stop string; cuts at the first to be complete.

    Of two that end together the longer one counts, so the pieces that text comes in do not matter.
    until: a text from whose beginning on none is looked for; one that reaches into it is none. So
    what may be its beginning is waited for, too.
    `found` is the stop string, None until then.
    """

    def __init__(self, stops: Sequence[str], until: str = ""):
        if not all(isinstance(stop, str) for stop in stops):
            raise DataError("a stop string is not text")
        if not all(stops):
            raise DataError("a stop string is empty")
        self.stops = list(stops)
        self.found: str | None = None
        self._until = until if stops else ""
        self._is_over = False
        self._waiting = ""

    @property
    def reached(self) -> bool:
        """Whether a stop string is complete."""
        return self.found is not None

    def add(self, text: str) -> str:
        """Take more text; return what is safe to show."""
        self._waiting += text
        over = self._waiting.find(self._until) if self._until else -1
        certain = over if over >= 0 else len(self._waiting) - self._overlap(self._until)
        if self._is_over or self._cut(certain):
            return self._shown(len(self._waiting))
        if over >= 0:
            self._is_over = True
            return self._shown(len(self._waiting))
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        starts = [start for _, start, _ in self._places()]
        return self._shown(min(certain, len(self._waiting) - keep, *starts))

    def finish(self) -> str:
        """What was kept back in vain."""
        if not self._is_over:
            self._cut(len(self._waiting))
        return self._shown(len(self._waiting))

    def _cut(self, certain: int) -> bool:
        """Whether a stop string is complete up to there; what is waiting then ends before it."""
        end, start, stop = min(self._places(), default=(0, 0, None))
        if stop is None or end > certain:
            return False
        self._waiting, self.found = self._waiting[:start], stop
        return True

    def _shown(self, length: int) -> str:
        shown, self._waiting = self._waiting[:length], self._waiting[length:]
        return shown

    def _places(self) -> list[tuple[int, int, str]]:
        """Where stop strings are in what is waiting: the end, the start, and which."""
        places = [(self._waiting.find(stop), stop) for stop in self.stops]
        return [(start + len(stop), start, stop) for start, stop in places if start >= 0]

    def _overlap(self, text: str) -> int:
        """Length of the longest end of the waiting text that begins `text` and is not all of it."""
        longest = min(len(text) - 1, len(self._waiting))
        return next((n for n in range(longest, 0, -1) if self._waiting.endswith(text[:n])), 0)
