"""The decode state of a batch of sequences: one object, a part for every layer.

Two kinds of storage: `Recent` keeps the last rows of something every token makes (window rows,
compressor projections); `Rows` keeps every row of something that only grows (compressed rows,
indexer rows). What a later token needs is read off these, so stepping back is moving their ends.
"""

from collections.abc import Iterator

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError

# Tokens a state can always step back, and at least to the multiple of 128 before them.
REWIND = 128
# New tokens a `Recent` takes before it moves what it keeps to the front of a new buffer.
SLACK = 128
# Tokens for which a `Rows` buffer grows at a time.
GROWTH = 4096


class RewindError(DataError):
    """The state at `wanted` tokens is gone.

    `nearest` is the reachable length closest to it, `below` the longest that is not beyond it.
    """

    def __init__(self, wanted: int, reachable: list[int], held: int):
        self.nearest = min(reachable, key=lambda n: abs(n - wanted))
        self.below = max((n for n in reachable if n <= wanted), default=0)
        super().__init__(
            f"cannot rewind to {wanted} of {held} tokens: the nearest reachable is {self.nearest}"
        )


class Recent:
    """The last rows of a growing sequence, at least `keep` of them, in one buffer (B, ., ...)."""

    def __init__(self, keep: int):
        self.keep = keep
        self.buffer: mx.array | None = None
        self.start = self.end = 0  # absolute positions of the rows held

    def extend(self, rows: mx.array, back: int) -> mx.array:
        """Take new rows (B, L, ...); return the `back` (<= keep) rows before them and them.

        Near the beginning there are fewer than `back`.
        """
        buffer = self._renew(rows[:, :0]) if self.buffer is None else self.buffer
        used, length = self.end - self.start, rows.shape[1]
        self.end += length
        if used + length <= buffer.shape[1]:
            buffer[:, used : used + length] = rows
            return buffer[:, max(0, used - back) : used + length]
        joined = mx.concatenate([buffer[:, max(0, used - self.keep) : used], rows], axis=1)
        self._renew(joined[:, -self.keep :])
        return joined[:, -(back + length) :]

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
        self.end = end
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

    def truncate(self, count: int) -> None:
        """Forget the rows from number `count` on."""
        self.count = count
        if count == 0:
            self.buffer = None


class CompressorState:
    """What a compressor of ratio m keeps: its recent projections and the rows it has emitted.

    Ratio 4 overlaps, so a group also needs the projections of the group before it.
    """

    def __init__(self, ratio: int):
        self.ratio = ratio
        self.overlap = ratio if ratio == 4 else 0
        self.recent = Recent(ratio - 1 + self.overlap + REWIND)
        self.rows = Rows(GROWTH // ratio)

    def needed(self, tokens: int) -> int:
        """Position of the oldest projection that continuing after `tokens` tokens needs."""
        return max(0, tokens // self.ratio * self.ratio - self.overlap)

    def truncate(self, tokens: int) -> None:
        """Go back to the state after `tokens` tokens."""
        self.recent.truncate(tokens)
        self.rows.truncate(tokens // self.ratio)


class LayerState:
    """The state of one block: window rows, and what its compressors keep (None where it has none)."""

    def __init__(self, config: ModelConfig, block: int):
        ratio = config.ratio(block)
        self.before = config.sliding_window - 1
        self.offset = 0
        self.window = Recent(self.before + REWIND)
        self.compressor = CompressorState(ratio) if ratio else None
        self.indexer = CompressorState(ratio) if ratio == 4 else None

    @property
    def compressors(self) -> list[CompressorState]:
        """The compressor states that this block has."""
        return [c for c in (self.compressor, self.indexer) if c is not None]

    @property
    def state(self) -> list[mx.array]:
        """The arrays held, for `mx.eval`."""
        parts = [self.window, *(p for c in self.compressors for p in (c.recent, c.rows))]
        return [part.buffer for part in parts if part.buffer is not None]

    def reaches(self, tokens: int) -> bool:
        """Whether the exact state after `tokens` tokens is still held."""
        if not self.window.reaches(max(0, tokens - self.before)):
            return False
        return all(c.recent.reaches(c.needed(tokens)) for c in self.compressors)

    def truncate(self, tokens: int) -> None:
        """Go back to the state after `tokens` tokens, which must be reachable."""
        self.offset = tokens
        self.window.truncate(tokens)
        for part in self.compressors:
            part.truncate(tokens)


class DecodeState:
    """The state of all main layers after `offset` tokens; iterating gives the layers' states."""

    def __init__(self, config: ModelConfig):
        self.layers = [LayerState(config, block) for block in range(config.num_hidden_layers)]

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    @property
    def offset(self) -> int:
        """Tokens held."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.state]

    @property
    def nbytes(self) -> int:
        """Bytes held, room for growth included."""
        return sum(array.nbytes for array in self.arrays)

    def rewind(self, tokens: int) -> None:
        """Go back to the exact state after `tokens` tokens.

        Always possible for 0, for the last 128 lengths, and for what the buffers still hold beyond.
        Raises RewindError (its `nearest` is the closest reachable length) and leaves the state
        as it is otherwise.
        """
        held = self.offset
        if not 0 <= tokens <= held or not self._reaches(tokens):
            oldest = max(layer.window.start for layer in self.layers)
            reachable = [0, *filter(self._reaches, range(oldest, held + 1))]
            raise RewindError(tokens, reachable, held)
        for layer in self.layers:
            layer.truncate(tokens)

    def _reaches(self, tokens: int) -> bool:
        return tokens == 0 or all(layer.reaches(tokens) for layer in self.layers)


def state_bytes(config: ModelConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of one sequence's DecodeState after `tokens` tokens with `itemsize`-byte activations."""
    total = 0
    for block in range(config.num_hidden_layers):
        state = LayerState(config, block)
        total += (state.window.keep + SLACK) * config.head_dim * itemsize
        widths = (config.head_dim, config.index_head_dim)
        for part, width in zip(state.compressors, widths, strict=False):
            lanes = 2 if part.overlap else 1
            total += (part.recent.keep + SLACK) * 2 * lanes * width * 4
            rows, growth = tokens // part.ratio, part.rows.growth
            total += -(-rows // growth) * growth * width * itemsize
    return total
