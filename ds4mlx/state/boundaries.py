"""At which positions a decode state makes boundary records, and which of them it keeps.

A boundary is a position at which a state can be resumed. Its record is what the state there holds
beside the rows that only grow: the window rows and the compressors' open projections. With it and
the rows, the state at that position is exact again. Boundaries are dense near the end of a
conversation and thinned behind it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Spacing:
    """How far behind any point the nearest boundary may be, in tokens.

    `dense` within the last `near` tokens, `sparse` before.
    """

    dense: int = 2048
    near: int = 16384
    sparse: int = 8192

    def thinned(self, positions: Iterable[int], end: int) -> set[int]:
        """Those of `positions` that a sequence of `end` tokens keeps; the last is always kept."""
        ordered = sorted(positions)
        kept, last = set(ordered[-1:]), 0
        for position, following in pairwise(ordered):
            reach = self.dense if following > end - self.near else self.sparse
            if following - last > reach:
                kept.add(position)
                last = position
        return kept

    def coarsened(self, end: int, most: int) -> "Spacing":
        """The same, with `sparse` doubled until about `most` boundaries do for `end` tokens."""
        sparse = self.sparse
        while (
            sparse < end and self.near // self.dense + 1 + max(0, end - self.near) // sparse > most
        ):
            sparse *= 2
        return Spacing(self.dense, self.near, sparse)


@dataclass
class Boundaries:
    """The positions at which records are made: every `dense` tokens, and those asked for."""

    spacing: Spacing = field(default_factory=Spacing)
    asked: frozenset[int] = frozenset()

    def passed(self, before: int, after: int) -> list[int]:
        """The boundaries in before + 1 .. after, in order."""
        step = self.spacing.dense
        regular = range((before // step + 1) * step, after + 1, step)
        asked = (p for p in self.asked if before < p <= after and p % step)
        return sorted((*regular, *asked))

    def regular(self, positions: Iterable[int]) -> list[int]:
        """Those of `positions` that were not asked for: only they are thinned."""
        return [p for p in positions if p % self.spacing.dense == 0]
