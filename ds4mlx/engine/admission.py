"""Who may come in: places in the queue, and the memory for states."""

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable

from ds4mlx.engine import room
from ds4mlx.engine.request import Busy, NoMemory, Stopping
from ds4mlx.engine.running import Job
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import state_bytes

# Tokens of an answer for which there must be room when its request begins; more is found on the way.
RESERVE = 4096
# Bounds of what a client is told to wait, in seconds.
SOONEST, LATEST = 1, 60


class Places:
    """Places of requests, of which `max_batch` are worked on and `max_queue` wait.

    Any thread may call this.
    """

    def __init__(self, max_batch: int, max_queue: int):
        self.max_batch, self.max_queue = max_batch, max_queue
        self._lock, self._taken, self._closed = threading.Lock(), 0, False
        self._gap, self._freed_at = 0.0, time.monotonic()

    def take(self) -> None:
        """Take a place. Raises Busy, Stopping."""
        with self._lock:
            self._check()
            if not self._taken:
                self._freed_at = time.monotonic()  # the time without requests is no wait
            self._taken += 1

    def check(self) -> None:
        """Raises Busy or Stopping where `take` would."""
        with self._lock:
            self._check()

    def free(self) -> None:
        """Give a place back."""
        with self._lock:
            now = time.monotonic()
            gap, self._freed_at = now - self._freed_at, now
            self._gap = gap if not self._gap else 0.75 * self._gap + 0.25 * gap
            self._taken -= 1

    def while_open(self, act: Callable[[], None]) -> None:
        """Do something that is never done after `close`. Raises Stopping."""
        with self._lock:
            if self._closed:
                raise Stopping
            act()

    def close(self) -> None:
        """Have nobody come in any more."""
        with self._lock:
            self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise Stopping
        if self._taken >= self.max_batch + self.max_queue:
            wait = min(max(math.ceil(self._gap), SOONEST), LATEST)
            raise Busy(self.max_queue, wait)


class StateMemory:
    """How many bytes states take, and how many they may: `budget`, or what the model leaves."""

    def __init__(self, model: Model, context: int, saving: bool, budget: int | None = None):
        self.budget = _left(model, context, saving) if budget is None else budget
        doubled = [1024 << n for n in range(context.bit_length()) if 1024 << n < context]
        self._lengths = [0, *doubled, context]
        self._bytes = [
            state_bytes(model.args, length, model.dtype, model.rounding) for length in self._lengths
        ]

    def needed(self, tokens: int) -> int:
        """Bytes of a state of so many tokens, about."""
        place = min(max(bisect_left(self._lengths, tokens), 1), len(self._lengths) - 1)
        first, last = self._lengths[place - 1 : place + 1]
        less, more = self._bytes[place - 1 : place + 1]
        return less + (more - less) * (min(tokens, last) - first) // max(last - first, 1)

    def of_job(self, job: Job) -> int:
        """Bytes of a request's state: with all of its prompt, and what its answer needs at first."""
        return self.needed(max(job.tokens, len(job.ids) + min(job.most, RESERVE)))

    def check(self, job: Job) -> None:
        """Raises NoMemory where one such request alone is too much."""
        if self.of_job(job) > self.budget:
            raise NoMemory(len(job.ids), self.of_job(job), self.budget)


def _left(model: Model, context: int, saving: bool) -> int:
    """What the weights and the scratch memory of a chunk leave for states here."""
    plan = room.of_model(model, context, saving=saving)
    return max(plan.room - plan.weights - plan.scratch - plan.buffers, 0)
