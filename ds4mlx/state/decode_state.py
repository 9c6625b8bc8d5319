"""The decode state of a batch of sequences: one object, a part for every layer.

Besides the layers' states it holds boundary records of some earlier lengths, to which it can go
back however far behind they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.state.boundaries import Marks
from ds4mlx.state.buffers import SLACK
from ds4mlx.state.layer import LayerState
from ds4mlx.state.record import cut_record, layer_record, load_record, record_bytes
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm, row_bytes

# Boundary records held in memory; longer sequences have them further apart.
RECORDS = 32


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


@dataclass(frozen=True)
class Stored:
    """Where a KV store has the rows of a state's first `tokens` tokens: a chain's last segment."""

    directory: Path
    segment: str
    tokens: int


class DecodeState:
    """The state of all main layers after `offset` tokens; iterating gives the layers' states.

    dtype and rounding are the model's. As the state passes multiples of 2,048 tokens, and the
    positions given to `mark`, it sets boundary records aside, bytes (B, n) by position.
    """

    def __init__(
        self, config: ModelConfig, dtype: mx.Dtype = mx.bfloat16, rounding: Rounding = "official"
    ):
        self.form = StateForm.of(config, dtype, rounding)
        self.marks = Marks()
        blocks = range(config.num_hidden_layers)
        self.layers = [LayerState(config, block, self.form, self.marks) for block in blocks]
        self.records: dict[int, mx.array] = {}
        self.stored: Stored | None = None

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
        return [*(array for layer in self.layers for array in layer.state), *self.records.values()]

    @property
    def nbytes(self) -> int:
        """Bytes held, room for growth and boundary records included."""
        return sum(array.nbytes for array in self.arrays)

    def mark(self, tokens: int) -> None:
        """Set a boundary record aside when the state comes to `tokens` tokens, also in a chunk."""
        self.marks.extra.add(tokens)

    def set_aside(self) -> None:
        """Make records of what the layers have cut out at marks; the model calls it every chunk."""
        if not self.layers[0].window.cuts:
            return
        for position in sorted(self.layers[0].window.cuts):
            self.records[position] = cut_record(self.layers, position)
            self.marks.extra.discard(position)
        for part in (part for layer in self.layers for part in layer.recents):
            part.cuts = {}
        step = self.marks.spacing.dense
        regular = [p for p in self.records if p % step == 0]
        if len(regular) > 1:
            end = max(regular)
            spacing = self.marks.spacing.coarsened(end, RECORDS)
            for position in set(regular) - spacing.thinned(regular, end):
                del self.records[position]

    def record(self, tokens: int) -> mx.array:
        """The boundary record, bytes (B, n), of the state after `tokens` tokens.

        Raises RewindError where it was neither set aside nor can be read off the buffers.
        """
        if tokens in self.records:
            return self.records[tokens]
        if not 0 < tokens <= self.offset or not self._reaches(tokens):
            raise self._unreachable(tokens)
        return layer_record(self.layers, tokens)

    def rewind(self, tokens: int) -> None:
        """Go back to the exact state after `tokens` tokens.

        Always possible for 0, for the last 128 lengths, for what the buffers still hold beyond,
        and for the positions of `records`. Otherwise raises RewindError (its `nearest` is the
        closest reachable length) and leaves the state as it is.
        """
        reachable = self._reaches(tokens) if 0 <= tokens <= self.offset else False
        if not reachable and (tokens not in self.records or tokens > self.offset):
            raise self._unreachable(tokens)
        if not reachable:
            load_record(self.layers, self.records[tokens], tokens)
        for layer in self.layers:
            layer.truncate(tokens)
        self.records = {p: r for p, r in self.records.items() if p <= tokens}
        self.marks.extra.clear()
        if self.stored is not None:
            self.stored = replace(self.stored, tokens=min(tokens, self.stored.tokens))

    def _unreachable(self, tokens: int) -> RewindError:
        held = self.offset
        oldest = max(layer.window.start for layer in self.layers)
        reachable = {0, *self.records, *filter(self._reaches, range(oldest, held + 1))}
        return RewindError(tokens, sorted(reachable), held)

    def _reaches(self, tokens: int) -> bool:
        return tokens == 0 or all(layer.reaches(tokens) for layer in self.layers)


def state_bytes(
    config: ModelConfig,
    tokens: int,
    dtype: mx.Dtype = mx.bfloat16,
    rounding: Rounding = "official",
) -> int:
    """Bytes of one sequence's DecodeState after `tokens` tokens, room for growth included."""
    state = DecodeState(config, dtype, rounding)
    total = 0
    for layer in state:
        total += (layer.window.keep + SLACK) * row_bytes(state.form.kv)
        for part, form in zip(layer.compressors, (state.form.kv, state.form.index), strict=False):
            total += (part.recent.keep + SLACK) * 2 * part.channels * 4
            total += part.rows.capacity(tokens // part.ratio) * row_bytes(form)
    step = state.marks.spacing.dense
    positions, end = range(step, tokens + 1, step), tokens // step * step
    kept = state.marks.spacing.coarsened(end, RECORDS).thinned(positions, end)
    return total + sum(record_bytes(state.layers, position) for position in kept)
