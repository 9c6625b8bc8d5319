"""The tokens of one call: one or several sequences, one after the other, and what each belongs to.

Everything of a layer that looks at one token at a time runs on all tokens (N, ...) together; only
attention asks which span of them belongs to which state. Positions, and their angles for each kind
of layer, are made here once a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.layer.plain import Angles
from ds4mlx.model.rope import Rotary
from ds4mlx.state.step import Step


@dataclass(frozen=True)
class Span:
    """One sequence of a batch: its place among all tokens, and what they change in its state.

    tables: the rotary table of the layers of each ratio.
    """

    tokens: slice
    step: Step
    tables: dict[int, Rotary]

    @cached_property
    def rows(self) -> dict[int, Angles]:
        """By ratio, the angles of the compressed rows that the tokens complete."""
        positions = {m: row_positions(self.step, m) for m in self.tables if m}
        return {m: self.tables[m].angles(each) for m, each in positions.items()}


@dataclass(frozen=True)
class Batch:
    """Token ids int (N,), one sequence after the other, and the spans.

    tables: the rotary table of the layers of each ratio, one object for each model. kept: whether the
    sequences have states that outlive the call.
    """

    ids: mx.array
    spans: list[Span]
    tables: dict[int, Rotary]
    kept: bool = False

    @classmethod
    def of(
        cls, ids: mx.array, steps: Sequence[Step], tables: dict[int, Rotary], kept: bool = False
    ) -> "Batch":
        """The batch of sequences that take these steps; ids (N,), one sequence after the other."""
        spans, first = [], 0
        for step in steps:
            last = first + step.end - step.offset
            spans.append(Span(slice(first, last), step, tables))
            first = last
        return cls(ids, spans, tables, kept)

    @cached_property
    def positions(self) -> mx.array:
        """Positions of the tokens, int (N,)."""
        return mx.array(self._positions)

    @cached_property
    def angles(self) -> dict[int, Angles]:
        """Angles of the tokens by a layer's ratio."""
        made = {table: table.angles(self._positions) for table in set(self.tables.values())}
        return {ratio: made[table] for ratio, table in self.tables.items()}

    @cached_property
    def _positions(self) -> np.ndarray:
        steps = [span.step for span in self.spans]
        return np.concatenate([np.arange(s.offset, s.end, dtype=np.int32) for s in steps])


def row_positions(step: Step, ratio: int) -> np.ndarray:
    """The positions to which the compressed rows that a step completes are rotated, int (g,).

    Row j stands for tokens ratio * j .. ratio * j + ratio - 1 and is rotated to the first of them.
    """
    return np.arange(step.offset // ratio, step.end // ratio) * ratio
