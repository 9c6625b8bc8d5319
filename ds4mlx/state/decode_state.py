"""The decode state of one sequence: one object, a part for every layer.

Besides the layers' states it has those of the draft blocks, and boundary records of some earlier
lengths, to which it can go back however far behind they are.
"""

import operator
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.state.boundaries import Boundaries
from ds4mlx.state.buffers import SLACK
from ds4mlx.state.changes import changes
from ds4mlx.state.drafts import Drafts
from ds4mlx.state.layer import LayerState
from ds4mlx.state.parts import Parts
from ds4mlx.state.record import layer_record, load_record, record_bytes, step_record
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm, row_bytes
from ds4mlx.state.step import Step

# Boundary records kept in memory; longer sequences have them further apart.
RECORDS = 32


class RewindError(DataError):
    """The state at `wanted` tokens is gone.

    `nearest` is the reachable length closest to it, `below` the longest that is not beyond it.
    """

    def __init__(self, wanted: int, reachable: list[int], offset: int):
        self.nearest = min(reachable, key=lambda n: abs(n - wanted))
        self.below = max((n for n in reachable if n <= wanted), default=0)
        super().__init__(
            f"cannot rewind to {wanted} of {offset} tokens: the nearest reachable is {self.nearest}"
        )


@dataclass(frozen=True)
class Stored:
    """Where a KV store has the rows of a state's first `tokens` tokens: a chain's last segment.

    `records`: the keys of records taken for it, by position and the draft blocks' lengths there.
    """

    directory: Path
    segment: str
    tokens: int
    records: dict[tuple[int, tuple[int, ...]], str] = field(default_factory=dict)

    def cut(self, tokens: int) -> "Stored":
        """What is left of it when the state goes back to `tokens` tokens."""
        records = {place: key for place, key in self.records.items() if place[0] <= tokens}
        return replace(self, tokens=min(tokens, self.tokens), records=records)


class DecodeState:
    """The state of one sequence after `offset` tokens; iterating gives the main layers' states.

    dtype and rounding are the model's. As the state passes multiples of 2,048 tokens, and the
    positions given to `add_boundary`, it makes boundary records, bytes (n,) by position.
    `parts` are everything in the layers that grows.
    `drafts` holds the draft blocks' states: rewinding, records and `nbytes` include them.
    `made_under` has the `changes` of the model under which any of its tokens were read.
    """

    def __init__(
        self, config: ModelConfig, dtype: mx.Dtype = mx.bfloat16, rounding: Rounding = "official"
    ):
        self.form = StateForm.of(config, dtype, rounding)
        self.boundaries = Boundaries()
        blocks = range(config.num_hidden_layers)
        self.layers = [LayerState(config, block, self.form) for block in blocks]
        self.parts = Parts(self.layers)
        self.drafts = Drafts(config, self.form)
        self.records: dict[int, mx.array] = {}  # without what they say of the drafts
        self.stored: Stored | None = None
        self.made_under: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeState":
        """A state of the same tokens that goes its own way; forms, which never change, are shared."""
        memo.update((id(form), form) for form in (self.form, *vars(self.form).values()))
        twin = object.__new__(DecodeState)
        memo[id(self)] = twin
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    def __repr__(self) -> str:
        """Its length and size, as in DecodeState(4,096 tokens, 23,068,672 bytes)."""
        return f"DecodeState({self.offset:,} tokens, {self.nbytes:,} bytes)"

    @property
    def offset(self) -> int:
        """Tokens read."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Every array in it, for `mx.eval`."""
        layers = (array for layer in self.layers for array in layer.state)
        return [*layers, *self.drafts.arrays, *self.records.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, room for growth and boundary records included."""
        return sum(array.nbytes for array in self.arrays)

    def add_boundary(self, tokens: int) -> None:
        """Have a record made when the state comes to `tokens` tokens, also within a chunk."""
        self.boundaries.asked |= {tokens}

    def drop_boundary(self, tokens: int) -> None:
        """Forget the record at a boundary that was asked for; a regular one stays."""
        if tokens not in self.boundaries.regular([tokens]):
            self.records = {p: r for p, r in self.records.items() if p != tokens}

    def step(self, tokens: int) -> Step:
        """A step of `tokens` tokens from here, for the layers to put their changes into."""
        end = self.offset + tokens
        return Step(self.offset, tokens, self.boundaries.passed(self.offset, end))

    def finish(self, step: Step) -> list[mx.array]:
        """Add to a step that all layers have taken the records of the boundaries it passes.

        Returns the arrays that are to be evaluated with what the step gives.
        """
        records = self.records
        step.change(self, made_under=self.made_under | {changes()})
        if step.boundaries:
            made = {b: step_record(self.layers, step, b) for b in step.boundaries}
            records = self._thinned(records | made)
            step.change(self, records=records)
            step.change(self.boundaries, asked=self.boundaries.asked - set(step.boundaries))
        return [*step.arrays, *records.values()]

    def _thinned(self, records: dict[int, mx.array]) -> dict[int, mx.array]:
        """The records without those that lie closer together than need be so far behind."""
        regular = self.boundaries.regular(records)
        end = max(regular, default=0)
        kept = self.boundaries.spacing.coarsened(end, RECORDS).thinned(regular, end)
        dropped = set(regular) - kept
        return {position: r for position, r in records.items() if position not in dropped}

    def record(self, tokens: int) -> mx.array:
        """The boundary record, bytes (n,), of the state after `tokens` tokens.

        Raises RewindError where there is none and it cannot be read off the buffers either.
        """
        main = self.records.get(tokens)
        if main is None:
            if not 0 < tokens <= self.offset or not self._reaches(tokens):
                raise self._unreachable(tokens)
            main = layer_record(self.layers, tokens)
        section = self.drafts.section(tokens)
        return mx.concatenate([main, section]) if section.size else main

    def load(self, record: mx.array, tokens: int) -> None:
        """Become the state after `tokens` tokens, whose rows are in place, by its record (n,)."""
        main = record_bytes(self.layers, tokens)
        load_record(self.layers, record[:main], tokens)
        self.drafts.load(record[main:])

    def rewind(self, tokens: int) -> None:
        """Go back to the exact state after `tokens` tokens.

        Possible for 0, for the positions of `records`, and for what the buffers reach: that is at
        least the last 128 lengths, as far as they were appended since the state was empty, came
        from a record (a rewind beyond the buffers), or from a store. A record carries what
        continuing from its own length needs and nothing before it. Draft blocks that are further
        than `tokens` go back to it too; those that lag behind stay where they are.
        Boundaries that lie ahead stay asked for. Raises RewindError (its `nearest` is the closest
        reachable length) and leaves the state as it is where the length is out of reach; TypeError
        for a length that is no integer.
        """
        tokens = operator.index(tokens)
        reachable = self._reaches(tokens) if 0 <= tokens <= self.offset else False
        if not reachable and (tokens not in self.records or tokens > self.offset):
            raise self._unreachable(tokens)
        if not reachable:
            load_record(self.layers, self.records[tokens], tokens)
        for layer in self.layers:
            layer.truncate(tokens)
        self.drafts.rewind(tokens)
        self.records = {p: r for p, r in self.records.items() if p <= tokens}
        if self.stored is not None:
            self.stored = self.stored.cut(tokens)
        if not tokens:
            self.made_under = frozenset()

    def reach(self, tokens: int) -> int:
        """The longest length up to `tokens` <= offset to which it can go back."""
        if self._reaches(tokens):
            return tokens
        return max((p for p in self.records if p <= tokens), default=0)

    def share(self, other: "DecodeState") -> None:
        """Become the same as another state of the kind; its arrays are shared until they change."""
        ours, theirs = [*self.layers, *self.drafts], [*other.layers, *other.drafts]
        for layer, another in zip(ours, theirs, strict=True):
            layer.share(another)
        self.records, self.stored = other.records, other.stored
        self.made_under = other.made_under
        self.drafts.records = other.drafts.records
        self.boundaries = replace(other.boundaries)

    def _unreachable(self, tokens: int) -> RewindError:
        offset = self.offset
        oldest = max(layer.window.start for layer in self.layers)
        reachable = {0, *self.records, *filter(self._reaches, range(oldest, offset + 1))}
        return RewindError(tokens, sorted(reachable), offset)

    def _reaches(self, tokens: int) -> bool:
        recents = self.parts.recents
        return tokens == 0 or all(part.reaches(part.needed(tokens)) for part in recents)


def state_bytes(
    config: ModelConfig,
    tokens: int,
    dtype: mx.Dtype = mx.bfloat16,
    rounding: Rounding = "official",
) -> int:
    """Bytes of a DecodeState after `tokens` tokens, room for growth included."""
    state = DecodeState(config, dtype, rounding)
    total = 0
    for layer in state:
        total += (layer.window.keep + SLACK) * row_bytes(layer.form)
        for part in layer.compressors:
            total += (part.recent.keep + SLACK) * 2 * part.channels * 4
            total += part.rows.capacity(tokens // part.ratio) * row_bytes(part.form)
    step = state.boundaries.spacing.dense
    positions, end = range(step, tokens + 1, step), tokens // step * step
    kept = state.boundaries.spacing.coarsened(end, RECORDS).thinned(positions, end)
    return total + sum(record_bytes(state.layers, position) for position in kept)
