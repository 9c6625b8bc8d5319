"""Who may come in: places in the queue, and the memory for states."""

import threading

from ds4mlx.engine.request import Busy, Stopping


class Places:
    """Places of requests, of which `max_batch` are worked on and `max_queue` wait.

    Any thread may call this.
    """

    def __init__(self, max_batch: int, max_queue: int):
        self.max_batch, self.max_queue = max_batch, max_queue
        self._lock, self._taken, self._closed = threading.Lock(), 0, False

    def take(self) -> None:
        """Take a place. Raises Busy, Stopping."""
        with self._lock:
            if self._closed:
                raise Stopping
            if self._taken >= self.max_batch + self.max_queue:
                raise Busy(self.max_queue, 1)
            self._taken += 1

    def free(self) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1

    def close(self) -> None:
        """Have nobody come in any more."""
        with self._lock:
            self._closed = True
