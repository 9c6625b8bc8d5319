"""What has happened since a scheduler's start, and how fast tokens come now."""

import time
from collections import deque

from ds4mlx.engine.request import Ended, Event, Status

# Seconds over which the speed is measured.
SPAN = 5.0


NAMES: tuple[str, ...] = ("requests", "ended", "failed", "cancelled", "chunks")
NAMES += ("prompt_tokens", "cached_tokens", "completion_tokens")


class Counts:
    """Counters by name, and the times of the last tokens."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = dict.fromkeys(NAMES, 0)
        self._times: deque[float] = deque()
        self._store_bytes = 0

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        self._counters[name] += count

    def took(self) -> None:
        """A token was taken."""
        self.add("completion_tokens")
        self._times.append(time.monotonic())

    def ended(self, event: Event | None, stored_bytes: int) -> None:
        """A request has ended with this event, None if it was cancelled."""
        kind = "ended" if isinstance(event, Ended) else "failed"
        self.add("cancelled" if event is None else kind)
        self._store_bytes = stored_bytes

    def status(self, running: int, waiting: int, state_bytes: int) -> Status:
        """All of it."""
        now = time.monotonic()
        while self._times and self._times[0] < now - SPAN:
            self._times.popleft()
        speed = len(self._times) / SPAN
        counters = dict(self._counters)
        return Status(running, waiting, state_bytes, self._store_bytes, speed, counters)
