"""Two kinds of storage of the decode state.

`Recent` keeps the last rows of something every token makes (window rows, compressor projections);
`Rows` keeps every row of something that only grows (compressed rows, indexer rows). What a later
token needs is read off these, so stepping back is moving their ends.
"""

from collections.abc import Callable

import mlx.core as mx

from ds4mlx.state.boundaries import Marks

# New tokens a `Recent` takes before it moves what it keeps to the front of a new buffer.
SLACK = 128


class Recent:
    """The last rows of a growing sequence, at least `keep` of them, in one buffer (B, ., ...).

    Where it passes a mark in the middle of a chunk it puts the rows that continuing from there
    needs, from position `needed(mark)` on, into `cuts`.
    """

    def __init__(
        self,
        keep: int,
        marks: Marks | None = None,
        needed: Callable[[int], int] = lambda mark: mark,
    ):
        self.keep, self.marks, self.needed = keep, marks, needed
        self.buffer: mx.array | None = None
        self.start = self.end = 0  # absolute positions of the rows held
        self.cuts: dict[int, mx.array] = {}

    def extend(self, rows: mx.array, back: int) -> mx.array:
        """Take new rows (B, L, ...); return the `back` (<= keep) rows before them and them.

        Near the beginning there are fewer than `back`.
        """
        buffer = self._renew(rows[:, :0]) if self.buffer is None else self.buffer
        used, length = self.end - self.start, rows.shape[1]
        self.end += length
        if used + length <= buffer.shape[1]:
            buffer[:, used : used + length] = rows
            span = buffer[:, max(0, used - back) : used + length]
        else:
            joined = mx.concatenate([buffer[:, max(0, used - self.keep) : used], rows], axis=1)
            self._renew(joined[:, -self.keep :])
            span = joined[:, -(back + length) :]
        if self.marks is not None:
            self._cut(span, self.marks.passed(self.end - length, self.end))
        return span

    def between(self, first: int, last: int) -> mx.array:
        """The rows of positions first..last-1, which must be held."""
        assert self.buffer is not None and self.start <= first <= last <= self.end
        return self.buffer[:, first - self.start : last - self.start]

    def load(self, rows: mx.array, end: int) -> None:
        """Hold `rows`, those before position `end`, and nothing else, not even room for more."""
        self.start, self.end, self.cuts = end - rows.shape[1], end, {}
        self.buffer = rows

    def _cut(self, span: mx.array, marks: list[int]) -> None:
        first = self.end - span.shape[1]
        for mark in marks:
            self.cuts[mark] = span[:, self.needed(mark) - first : mark - first]

    def _renew(self, kept: mx.array) -> mx.array:
        """Start a new buffer that begins with `kept`, the rows up to the end."""
        batch, count, *width = kept.shape
        room = mx.zeros((batch, self.keep + SLACK - count, *width), kept.dtype)
        self.buffer = mx.concatenate([kept, room], axis=1)
        self.start = self.end - count
        return self.buffer

    def reaches(self, position: int) -> bool:
        """Whether the rows from `position` to the end are held."""
        return self.start <= position

    def truncate(self, end: int) -> None:
        """Forget the rows from position `end` on."""
        self.end, self.cuts = end, {}
        if end == 0:
            self.buffer, self.start = None, 0


class Rows:
    """Every row so far of something that only grows, in a buffer (B, capacity, width)."""

    def __init__(self, growth: int):
        self.growth = growth
        self.buffer: mx.array | None = None
        self.count = 0

    def extend(self, rows: mx.array) -> mx.array:
        """Append rows (B, g, width), g >= 0, and return all rows (B, count, width)."""
        first, self.count = self.count, self.count + rows.shape[1]
        buffer = self._grown(rows[:, :0] if self.buffer is None else self.buffer)
        if self.count > first:
            buffer[:, first : self.count] = rows
        self.buffer = buffer
        return buffer[:, : self.count]

    def _grown(self, held: mx.array) -> mx.array:
        """A buffer with room for `count` rows that begins with `held`."""
        batch, capacity, width = held.shape
        if self.count <= capacity:
            return held
        more = -(-(self.count - capacity) // self.growth) * self.growth
        return mx.concatenate([held, mx.zeros((batch, more, width), held.dtype)], axis=1)

    def load(self, buffer: mx.array, count: int) -> None:
        """Hold the first `count` rows of `buffer` (B, capacity, width)."""
        self.buffer, self.count = buffer, count

    def capacity(self, count: int) -> int:
        """Rows that a buffer grown for `count` rows has room for."""
        return -(-count // self.growth) * self.growth

    def truncate(self, count: int) -> None:
        """Forget the rows from number `count` on."""
        self.count = count
        if count == 0:
            self.buffer = None
