"""The two kinds of buffer of a decode state.

`Recent` keeps the last rows of something every token makes (window rows, compressor projections);
`Rows` keeps every row of something that only grows (compressed rows, indexer rows). What a later
token needs is read off these, so stepping back is moving their ends. A buffer is written in place
when its graph is evaluated, beyond the end that is committed.
"""

from collections.abc import Callable
from copy import copy

import mlx.core as mx

from ds4mlx.state.step import Step

# New tokens a `Recent` takes before it moves what it keeps to the front of a new buffer.
SLACK = 128


class Recent:
    """The last rows of a growing sequence, at least `keep` of them, in one buffer (capacity, ...).

    A record at a boundary takes the rows from position `needed(boundary)` on.
    """

    def __init__(self, keep: int, needed: Callable[[int], int] = lambda boundary: boundary):
        self.keep, self.needed = keep, needed
        self.buffer: mx.array | None = None
        self.start = self.end = 0  # absolute positions of the rows in the buffer

    def extend(self, rows: mx.array, back: int, step: Step) -> mx.array:
        """Take new rows (L, ...) as a part of a step; the `back` (<= keep) rows before and them.

        Near the beginning there are fewer than `back`.
        """
        buffer = self._roomy(rows[:0]) if self.buffer is None else self.buffer
        used, start = self.end - self.start, self.start
        stop, end = used + len(rows), self.end + len(rows)
        if stop <= len(buffer):
            buffer = _written(buffer, rows, used)
            span = buffer[max(0, used - back) : stop]
        else:
            joined = mx.concatenate([buffer[max(0, used - self.keep) : used], rows])
            kept = joined[-self.keep :]
            buffer, start = self._roomy(kept), end - len(kept)
            span = joined[-(back + len(rows)) :]
        first = end - len(span)
        for boundary in step.boundaries:
            piece = span[self.needed(boundary) - first : boundary - first]
            step.pieces[self, boundary] = piece
        step.change(self, buffer=buffer, start=start, end=end)
        return span

    def between(self, first: int, last: int) -> mx.array:
        """The rows of positions first..last-1, which must be in the buffer."""
        assert self.buffer is not None and self.start <= first <= last <= self.end
        return self.buffer[first - self.start : last - self.start]

    def load(self, rows: mx.array, end: int) -> None:
        """Hold `rows`, those before position `end`, and nothing else, not even room for more."""
        self.buffer, self.start, self.end = rows, end - len(rows), end

    def _roomy(self, kept: mx.array) -> mx.array:
        """A new buffer that begins with `kept`."""
        count, *width = kept.shape
        room = mx.zeros((self.keep + SLACK - count, *width), kept.dtype)
        return mx.concatenate([kept, room])

    def reaches(self, position: int) -> bool:
        """Whether the rows from `position` to the end are in the buffer."""
        return self.start <= position

    def truncate(self, end: int) -> None:
        """Forget the rows from position `end` on."""
        self.end = end
        if end == 0:
            self.buffer, self.start = None, 0


class Rows:
    """Every row so far of something that only grows, in a buffer (capacity, width)."""

    def __init__(self, growth: int):
        self.growth = growth
        self.buffer: mx.array | None = None
        self.count = 0

    def extend(self, rows: mx.array, step: Step) -> mx.array:
        """Append rows (g, width), g >= 0, as a part of a step; all rows (count, width)."""
        buffer, count = rows[:0] if self.buffer is None else self.buffer, self.count + len(rows)
        if len(rows):
            buffer = _written(self._grown(buffer, count), rows, self.count)
            step.change(self, buffer=buffer, count=count)
        return buffer[:count]

    def _grown(self, buffer: mx.array, count: int) -> mx.array:
        """A buffer with room for `count` rows that begins with `buffer`."""
        capacity, width = buffer.shape
        if count <= capacity:
            return buffer
        more = self.capacity(count - capacity)
        return mx.concatenate([buffer, mx.zeros((more, width), buffer.dtype)])

    def load(self, buffer: mx.array, count: int) -> None:
        """Hold the first `count` rows of `buffer` (capacity, width)."""
        self.buffer, self.count = buffer, count

    def capacity(self, count: int) -> int:
        """Rows that a buffer grown for `count` rows has room for."""
        return -(-count // self.growth) * self.growth

    def truncate(self, count: int) -> None:
        """Forget the rows from number `count` on."""
        self.count = count
        if count == 0:
            self.buffer = None


def _written(buffer: mx.array, rows: mx.array, first: int) -> mx.array:
    """The buffer with `rows` from row `first` on; the array given stays what it is.

    The memory is the same as long as nothing else holds the buffer when this is evaluated.
    """
    written = copy(buffer)
    written[first : first + len(rows)] = rows
    return written
