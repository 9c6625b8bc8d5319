"""The tokens of one call: one or several sequences, one after the other, and what each belongs to.

Everything of a layer that looks at one token at a time runs on all tokens (N, ...) together; only
attention asks which span of them belongs to which state. Positions, and their angles for each kind
of layer, are made here once a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.custom_kernels.layer.plain import Angles
from ds4mlx.model.rope import Rotary
from ds4mlx.state.step import Step


@dataclass(frozen=True)
class Span:
    """One sequence of a batch: its place among all tokens, and what they change in its state.

    `rows` holds, by ratio, the angles of the compressed rows that the tokens complete.
    """

    tokens: slice
    step: Step
    rows: dict[int, Angles]


@dataclass(frozen=True)
class Batch:
    """Token ids int (N,), their positions int (N,), their angles by a layer's ratio, the spans."""

    ids: mx.array
    positions: mx.array
    angles: dict[int, Angles]
    spans: list[Span]

    @classmethod
    def of(cls, ids: mx.array, steps: Sequence[Step], tables: dict[int, Rotary]) -> "Batch":
        """The batch of sequences that take these steps; ids (N,), one sequence after the other.

        tables: the rotary table of the layers of each ratio.
        """
        positions = np.concatenate([np.arange(s.offset, s.end, dtype=np.int32) for s in steps])
        made = {table: table.angles(positions) for table in set(tables.values())}
        spans, first = [], 0
        for step in steps:
            last = first + step.end - step.offset
            rows = {m: t.angles(row_positions(step, m)) for m, t in tables.items() if m}
            spans.append(Span(slice(first, last), step, rows))
            first = last
        return cls(ids, mx.array(positions), {m: made[t] for m, t in tables.items()}, spans)


def row_positions(step: Step, ratio: int) -> np.ndarray:
    """The positions to which the compressed rows that a step completes are rotated, int (g,).

    Row j stands for tokens ratio * j .. ratio * j + ratio - 1 and is rotated to the first of them.
    """
    return np.arange(step.offset // ratio, step.end // ratio) * ratio
