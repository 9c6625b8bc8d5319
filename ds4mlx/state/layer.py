"""The state of one block: its window rows, and what its compressors keep."""

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.buffers import begins
from ds4mlx.state.buffers import Recent, Rows
from ds4mlx.state.row_forms import RowForm, StateForm

# Tokens a state can step back over those that were appended to it.
REWIND = 128

# Tokens for which a `Rows` buffer grows at a time.
GROWTH = 4096


class CompressorState:
    """What a compressor of ratio m keeps: its recent projections and the rows it has emitted.

    `form` is how the rows are laid out. Ratio 4 overlaps, so a group also needs the projections of
    the group before it.
    """

    def __init__(self, ratio: int, width: int, form: RowForm):
        self.ratio, self.width, self.form = ratio, width, form
        self.overlap = ratio if ratio == 4 else 0
        blank = mx.zeros((0, 2, self.channels))
        self.recent = Recent(ratio - 1 + self.overlap + REWIND, self.needed, blank)
        self.rows = Rows(GROWTH // ratio, mx.zeros((0, form.elements), form.dtype), ratio)

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
    """The state of one block: the window rows, laid out as `form`, and its compressors' states.

    `compressors` is empty in a block that sees its window only; else the first is that of the KV
    rows, and the second, in CSA blocks, the indexer's.
    """

    def __init__(self, config: ModelConfig, block: int, form: StateForm):
        ratio = config.ratio(block)
        self.form = form.kv
        self.before = config.sliding_window - 1
        blank = mx.zeros((0, self.form.elements), self.form.dtype)
        self.window = Recent(self.before + REWIND, self.needed, blank)
        kinds = [(config.head_dim, form.kv), (config.index_head_dim, form.index)]
        count = {0: 0, 4: 2, 128: 1}[ratio]
        self.compressors = [CompressorState(ratio, width, rows) for width, rows in kinds[:count]]
        # Everything that grows with the tokens.
        self.parts: list[Recent | Rows] = [self.window]
        self.parts += [part for c in self.compressors for part in (c.recent, c.rows)]
        *firsts, self.tail_words = begins([part.tail_form for part in self.parts])
        for part, first in zip(self.parts, firsts, strict=True):
            part.tail_at = first

    @property
    def offset(self) -> int:
        """Tokens read; between two calls the same in all main layers."""
        return self.window.end

    def needed(self, tokens: int) -> int:
        """Position of the oldest window row that continuing after `tokens` tokens needs."""
        return max(0, tokens - self.before)

    def empty_tails(self) -> None:
        """Have every part, all of whose rows lie in its buffer, go on in an empty tail."""
        tails = mx.zeros((self.tail_words,), mx.uint32)
        for part in self.parts:
            part.tail = tails

    @property
    def recents(self) -> list[Recent]:
        """The window and the compressors' recent projections."""
        return [self.window, *(c.recent for c in self.compressors)]

    @property
    def state(self) -> list[mx.array]:
        """The arrays in it, each once, for `mx.eval`."""
        return list({id(a): a for part in self.parts for a in part.arrays}.values())

    @property
    def nbytes(self) -> int:
        """Their bytes, which mlx-lm counts of the states that it keeps."""
        return sum(array.nbytes for array in self.state)

    def reaches(self, tokens: int) -> bool:
        """Whether the exact state after `tokens` tokens can be read off the buffers."""
        return all(part.reaches(part.needed(tokens)) for part in self.recents)

    def is_trimmable(self) -> bool:
        """False, which is what mlx-lm asks: a layer alone cannot go back. `DecodeState.rewind` can.

        Its trimming goes layer by layer and takes any length for reachable.
        """
        return False

    def share(self, other: "LayerState") -> None:
        """Hold the same rows as another one; the arrays are shared until they change."""
        for mine, theirs in zip(self.recents, other.recents, strict=True):
            mine.share(theirs)
        for ours, another in zip(self.compressors, other.compressors, strict=True):
            ours.rows.share(another.rows)

    def truncate(self, tokens: int) -> None:
        """Go back to the state after `tokens` tokens, which must be reachable."""
        self.window.truncate(tokens)
        for part in self.compressors:
            part.truncate(tokens)
