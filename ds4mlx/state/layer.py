"""The state of one block: its window rows, and what its compressors keep."""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.state.boundaries import Marks
from ds4mlx.state.buffers import Recent, Rows
from ds4mlx.state.row_forms import StateForm

# Tokens a state can always step back, and at least to the multiple of 128 before them.
REWIND = 128


# Tokens for which a `Rows` buffer grows at a time.
GROWTH = 4096


class CompressorState:
    """What a compressor of ratio m keeps: its recent projections and the rows it has emitted.

    Ratio 4 overlaps, so a group also needs the projections of the group before it.
    """

    def __init__(self, ratio: int, width: int, marks: Marks | None = None):
        self.ratio, self.width = ratio, width
        self.overlap = ratio if ratio == 4 else 0
        self.recent = Recent(ratio - 1 + self.overlap + REWIND, marks, self.needed)
        self.rows = Rows(GROWTH // ratio)

    @property
    def channels(self) -> int:
        """Channels of a projection: one lane of `width`, or two where groups overlap."""
        return 2 * self.width if self.overlap else self.width

    def needed(self, tokens: int) -> int:
        """Position of the oldest projection that continuing after `tokens` tokens needs."""
        return max(0, tokens // self.ratio * self.ratio - self.overlap)

    def truncate(self, tokens: int) -> None:
        """Go back to the state after `tokens` tokens."""
        self.recent.truncate(tokens)
        self.rows.truncate(tokens // self.ratio)


class LayerState:
    """The state of one block: window rows, and what its compressors keep (None where it has none).

    `form` says how KV rows and indexer rows are held; `marks` where the block cuts out what a
    boundary record needs.
    """

    def __init__(
        self, config: ModelConfig, block: int, form: StateForm, marks: Marks | None = None
    ):
        ratio = config.ratio(block)
        self.form = form
        self.before = config.sliding_window - 1
        self.offset = 0
        self.window = Recent(self.before + REWIND, marks, self.needed)
        index, both = config.index_head_dim, ratio == 4
        self.compressor = CompressorState(ratio, config.head_dim, marks) if ratio else None
        self.indexer = CompressorState(ratio, index, marks) if both else None

    def needed(self, tokens: int) -> int:
        """Position of the oldest window row that continuing after `tokens` tokens needs."""
        return max(0, tokens - self.before)

    @property
    def compressors(self) -> list[CompressorState]:
        """The compressor states that this block has."""
        return [c for c in (self.compressor, self.indexer) if c is not None]

    @property
    def recents(self) -> list[Recent]:
        """The window and the compressors' recent projections."""
        return [self.window, *(c.recent for c in self.compressors)]

    @property
    def state(self) -> list[mx.array]:
        """The arrays held, for `mx.eval`."""
        parts = [self.window, *(p for c in self.compressors for p in (c.recent, c.rows))]
        return [part.buffer for part in parts if part.buffer is not None]

    def reaches(self, tokens: int) -> bool:
        """Whether the exact state after `tokens` tokens can be read off the buffers."""
        return all(part.reaches(part.needed(tokens)) for part in self.recents)

    def truncate(self, tokens: int) -> None:
        """Go back to the state after `tokens` tokens, which must be reachable."""
        self.offset = tokens
        self.window.truncate(tokens)
        for part in self.compressors:
            part.truncate(tokens)
