"""The draft blocks' part of a decode state: a layer state each, each at a length of its own.

A draft block reads the streams at position t together with token t + 1, so it can have read at most
as many positions as the main layers, and usually lags behind. It costs nothing until it runs. What
a record says of it stands after the main layers' bytes, as a section: for each block its length
(8 bytes) and, unless that is 0, its own boundary record and every compressed row so far.
"""

from collections.abc import Container, Iterator

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.state.layer import LayerState
from ds4mlx.state.record import layer_record, load_record, raw_bytes, record_bytes, step_record
from ds4mlx.state.row_forms import StateForm, row_bytes
from ds4mlx.state.step import Step

# Bytes in which a section gives a block's length.
LENGTH = mx.int64.size


class Drafts:
    """The states of the draft blocks; iterating gives them, and an index is a block's depth.

    `records`: by depth and position, bytes (n,), at boundaries of the main state that it passed.
    """

    def __init__(self, config: ModelConfig, form: StateForm):
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        self.blocks = [LayerState(config, first + depth, form) for depth in range(count)]
        self.records: dict[tuple[int, int], mx.array] = {}

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, depth: int) -> LayerState:
        return self.blocks[depth]

    @property
    def arrays(self) -> list[mx.array]:
        """Every array in it, for `mx.eval`."""
        return [*(array for block in self.blocks for array in block.state), *self.records.values()]

    def step(self, depth: int, tokens: int, boundaries: Container[int]) -> Step:
        """A step of block `depth`; `boundaries`: positions of which the main layers have records."""
        offset = self.blocks[depth].offset
        passed = [p for p in range(offset + 1, offset + tokens + 1) if p in boundaries]
        return Step(offset, tokens, passed)

    def finish(self, depth: int, step: Step, boundaries: Container[int]) -> list[mx.array]:
        """Add to a step, as `DecodeState.finish` does, the records of the boundaries it passes."""
        block = self.blocks[depth]
        made = {(depth, p): step_record([block], step, p) for p in step.boundaries}
        records = {key: r for key, r in self.records.items() if key[1] in boundaries} | made
        step.change(self, records=records)
        return [*step.arrays, *records.values()]

    def rewind(self, tokens: int) -> None:
        """Have no block be further than `tokens`; one that cannot go back there becomes empty.

        That does not happen to a block which ran after its main layers.
        """
        for depth, length in enumerate(self.lengths(tokens)):
            block = self.blocks[depth]
            if not block.reaches(length) and length:
                load_record([block], self.records[depth, length], length)
            block.truncate(length)
        self.records = {key: r for key, r in self.records.items() if key[1] <= tokens}

    def section(self, tokens: int) -> mx.array:
        """What a record after `tokens` tokens says of the blocks, bytes (n,); none if none ran."""
        lengths = self.lengths(tokens)
        if not any(lengths):
            return mx.zeros((0,), mx.uint8)
        pieces = []
        for depth, length in enumerate(lengths):
            pieces += [mx.array([length], mx.int64), *self._pieces(depth, length)]
        return mx.concatenate([raw_bytes(piece) for piece in pieces])

    def load(self, section: mx.array) -> None:
        """Become what a section, bytes (n,), says."""
        self.records, at = {}, 0
        for block in self.blocks:
            block.truncate(0)
            if section.size:
                length = int.from_bytes(bytes(section[at : at + LENGTH]), "little")
                at = _load_block(block, section, at + LENGTH, length) if length else at + LENGTH

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """What each block has read when the main layers are back at `tokens`."""
        return tuple(self._length(depth, tokens) for depth in range(len(self.blocks)))

    def _length(self, depth: int, tokens: int) -> int:
        block = self.blocks[depth]
        length = min(block.offset, tokens)
        return length if block.reaches(length) or (depth, length) in self.records else 0

    def _pieces(self, depth: int, length: int) -> list[mx.array]:
        """A block's boundary record and its compressed rows."""
        if not length:
            return []
        block, record = self.blocks[depth], self.records.get((depth, length))
        record = layer_record([block], length) if record is None else record
        rows = (part.rows.between(0, length // part.ratio) for part in block.compressors)
        return [record, *(piece for pieces in rows for piece in pieces)]


def _load_block(block: LayerState, section: mx.array, at: int, length: int) -> int:
    """Make the block what its bytes from `at` on say; where those end."""
    end = at + record_bytes([block], length)
    load_record([block], section[at:end], length)
    for part in block.compressors:
        count = length // part.ratio
        at, end = end, end + count * row_bytes(part.form)
        if count:
            rows = mx.contiguous(section[at:end]).view(part.form.dtype)
            part.rows.load(rows.reshape(count, part.form.elements), count)
    return end
