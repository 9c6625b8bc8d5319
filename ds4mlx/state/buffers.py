"""The two kinds of buffer of a decode state.

`Recent` keeps the last rows of something every token makes (window rows, compressor projections);
`Rows` keeps every row of something that only grows (compressed rows, indexer rows). What a later
token needs is read off these, so stepping back is moving their ends.

A chunk is written into the buffer in place when its graph is evaluated, beyond the end that is
committed. Steps of one token that run as launches leave the buffer alone, since a GPU that still reads
it would have to copy it: their rows go to a short tail behind it, and a full tail is moved at once.
The tails of all buffers of a layer lie side by side in one array.
"""

from collections.abc import Callable
from copy import copy

import mlx.core as mx

from ds4mlx.custom_kernels.layer.buffers import Tail, TailForm
from ds4mlx.state.step import Step

# New tokens a `Recent` takes before it moves what it keeps to the front of a new buffer.
SLACK = 128

# Rows of a tail: of something every token makes, and of something that only grows.
SPAN, TAIL = 32, 256


class Part:
    """What both kinds have: a buffer, and behind it a tail from row `settled` on.

    tail: the array of a layer's tails, uint32 (n,), of which this one's begins at word `tail_at` and has
    room for so many rows as `room` says; None where there is none. blank (0, ...): how rows are.
    """

    buffer: mx.array | None = None
    tail: mx.array | None = None
    tail_at = settled = 0

    def __init__(self, blank: mx.array):
        self.blank = blank

    @property
    def room(self) -> int:
        """Rows that a tail has room for."""
        raise NotImplementedError

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays in it: the buffer, and the one in which its tail lies beside others."""
        return [array for array in (self.buffer, self.tail) if array is not None]

    @property
    def tail_form(self) -> TailForm:
        """How a tail lies."""
        return TailForm((self.room, *self.blank.shape[1:]), self.blank.dtype)

    @property
    def newer(self) -> mx.array:
        """The rows of the tail, and room for more."""
        assert self.tail is not None
        return Tail(self.tail, self.tail_at, self.tail_form).value


class Recent(Part):
    """The last rows of a growing sequence, at least `keep` of them, in one buffer (capacity, ...).

    Those from position `settled` on are in the tail, where there is one. A record at a boundary
    takes the rows from position `needed(boundary)` on.
    """

    def __init__(
        self,
        keep: int,
        needed: Callable[[int], int] = lambda boundary: boundary,
        blank: mx.array | None = None,
    ):
        super().__init__(mx.zeros((0,)) if blank is None else blank)
        self.keep, self.needed = keep, needed
        self.first = 0  # position of the buffer's first row; rows before `start` are no rows
        self.start = self.end = self.settled = 0  # absolute positions

    @property
    def room(self) -> int:
        """Rows that a tail has room for."""
        return SPAN

    def extend(self, rows: mx.array, back: int, step: Step) -> mx.array:
        """Take new rows (L, ...) as a part of a step; the `back` (<= keep) rows before and them.

        Near the beginning there are fewer than `back`.
        """
        buffer, first = self._joined(rows[:0])
        used, start = self.end - first, max(self.start, first)
        stop, end = used + len(rows), self.end + len(rows)
        if stop <= len(buffer):
            buffer = _written(buffer, rows, used)
            span = buffer[max(start - first, used - back) : stop]
        else:
            joined = mx.concatenate([buffer[max(start - first, used - self.keep) : used], rows])
            kept = joined[-self.keep :]
            buffer, start = self._roomy(kept), end - len(kept)
            span, first = joined[-(back + len(rows)) :], start
        from_ = end - len(span)
        for boundary in step.boundaries:
            piece = span[self.needed(boundary) - from_ : boundary - from_]
            step.pieces[self, boundary] = piece
        step.change(self, buffer=buffer, tail=None, first=first, start=start, end=end)
        return span

    def piece(self, tail: mx.array, boundary: int) -> mx.array:
        """What a record at a boundary takes when the row before it stands in these new tails."""
        moved = copy(self)
        moved.tail, moved.end = tail, boundary
        return moved.between(self.needed(boundary), boundary)

    def between(self, first: int, last: int) -> mx.array:
        """The rows of positions first..last-1, which must be in the buffer or the tail."""
        assert self.buffer is not None and self.start <= first <= last <= self.end
        if self.tail is None or last <= self.settled:
            return self.buffer[first - self.first : last - self.first]
        new = self.newer[max(first - self.settled, 0) : last - self.settled]
        if first >= self.settled:
            return new
        return mx.concatenate([self.buffer[first - self.first : self.settled - self.first], new])

    def load(self, rows: mx.array, end: int) -> None:
        """Hold `rows`, those before position `end`, and nothing else, not even room for more."""
        self.buffer, self.tail, self.end = rows, None, end
        self.first = self.start = end - len(rows)

    def share(self, other: "Recent") -> None:
        """Hold the same rows as another one."""
        self.buffer, self.tail, self.first = other.buffer, other.tail, other.first
        self.start, self.end, self.settled = other.start, other.end, other.settled

    def settle(self) -> None:
        """Have `keep` rows that end at `end` lie in the buffer, and none in a tail."""
        count, blank = min(self.keep, self.end - self.start), self.blank
        kept = self.between(self.end - count, self.end) if count else blank
        shape = blank.shape[1:]
        if count < self.keep:
            kept = mx.concatenate([mx.zeros((self.keep - count, *shape), blank.dtype), kept])
        self.buffer = kept
        self.first, self.start, self.settled = self.end - self.keep, self.end - count, self.end

    def moved_up(self, buffer: mx.array) -> None:
        """Take the buffer that ends with the rows of the tail, which is full."""
        first, end = self.end - self.keep, self.end
        start = max(self.start, first)
        # No call between the changes, at which Ctrl-C could come.
        self.buffer, self.settled, self.first, self.start = buffer, end, first, start

    def _joined(self, blank: mx.array) -> tuple[mx.array, int]:
        """A buffer of all rows without a tail, and the position of its first."""
        if self.buffer is None:
            return self._roomy(blank), self.end
        if self.tail is None:
            return self.buffer, self.first
        return self._roomy(self.between(self.start, self.end)[-self.keep :]), max(
            self.start, self.end - self.keep
        )

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
        if self.tail is not None and end < self.settled:
            self.tail = None
        if end == 0:
            self.buffer, self.tail, self.first, self.start = None, None, 0, 0


class Rows(Part):
    """Every row so far of something that only grows, in a buffer (capacity, width).

    Those from number `settled` on are in the tail, where there is one. `ratio` tokens make a row.
    """

    def __init__(self, growth: int, blank: mx.array | None = None, ratio: int = 1):
        super().__init__(mx.zeros((0, 1)) if blank is None else blank)
        self.growth, self.ratio = growth, ratio
        self.count = self.settled = 0

    @property
    def room(self) -> int:
        """Rows that a tail has room for."""
        return TAIL

    def extend(self, rows: mx.array, step: Step) -> mx.array:
        """Append rows (g, width), g >= 0, as a part of a step; all rows (count, width)."""
        buffer, count = rows[:0] if self.buffer is None else self.buffer, self.count + len(rows)
        new, first = rows, self.count
        if self.tail is not None:
            new, first = mx.concatenate([self.newer[: first - self.settled], rows]), self.settled
        if len(new):
            buffer = _written(self._grown(buffer, count), new, first)
        if len(new) or self.tail is not None:
            step.change(self, buffer=buffer, tail=None, count=count)
        return buffer[:count]

    def between(self, first: int, last: int) -> list[mx.array]:
        """The rows of numbers first..last-1, in one piece or two."""
        pieces = []
        edge = self.settled if self.tail is not None else self.count
        if self.buffer is not None and first < min(last, edge):
            pieces.append(self.buffer[first : min(last, edge)])
        if self.tail is not None and max(first, edge) < last:
            pieces.append(self.newer[max(first, edge) - edge : last - edge])
        return pieces

    @property
    def full(self) -> bool:
        """Whether the tail has no room for another row."""
        return self.tail is not None and self.count - self.settled == TAIL

    def settle(self) -> None:
        """Have all rows lie in the buffer, and none in a tail."""
        buffer = self.blank if self.buffer is None else self.buffer
        if self.tail is not None and self.count > self.settled:
            new = self.newer[: self.count - self.settled]
            buffer = _written(self._grown(buffer, self.count), new, self.settled)
        if not len(buffer):
            buffer = self._grown(buffer, 1)
        self.buffer, self.settled = buffer, self.count

    def _grown(self, buffer: mx.array, count: int) -> mx.array:
        """A buffer with room for `count` rows that begins with `buffer`."""
        capacity, width = buffer.shape
        if count <= capacity:
            return buffer
        more = self.capacity(count - capacity)
        return mx.concatenate([buffer, mx.zeros((more, width), buffer.dtype)])

    def load(self, buffer: mx.array, count: int) -> None:
        """Hold the first `count` rows of `buffer` (capacity, width)."""
        self.buffer, self.tail, self.count = buffer, None, count

    def share(self, other: "Rows") -> None:
        """Hold the same rows as another one."""
        self.buffer, self.tail = other.buffer, other.tail
        self.count, self.settled = other.count, other.settled

    def capacity(self, count: int) -> int:
        """Rows that a buffer grown for `count` rows has room for."""
        return -(-count // self.growth) * self.growth

    def truncate(self, count: int) -> None:
        """Forget the rows from number `count` on."""
        self.count = count
        if self.tail is not None and count < self.settled:
            self.tail = None
        if count == 0:
            self.buffer = self.tail = None


def _written(buffer: mx.array, rows: mx.array, first: int) -> mx.array:
    """The buffer with `rows` from row `first` on; the array given stays what it is.

    The memory is the same as long as nothing else holds the buffer when this is evaluated.
    """
    written = copy(buffer)
    written[first : first + len(rows)] = rows
    return written
