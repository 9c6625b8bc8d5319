"""From rows of a source tensor to rows of the planes that a format keeps, and back."""

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ds4mlx.convert import codecs
from ds4mlx.convert.feedback import Moment
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.quantise import QUANTISERS, Loss, on_device, quantise
from ds4mlx.convert.quantise_fed import FED, quantise_stack
from ds4mlx.convert.sources import Source
from ds4mlx.weights.inventory import Entry, experts

# float32 bytes that a chunk of rows may take; rows come in multiples of 128, the height of a tile.
CHUNK = 32 << 20
TILE = 128
NOTHING_LOST = Loss()
# Weights of a stack of experts that are rounded together where they share second moments: on a GPU two
# matrices of Flash, as the launches for one are too small.
CPU_STACK, GPU_STACK = 1 << 20, 1 << 24


@dataclass(frozen=True)
class Rows:
    """Encoded rows: planes (rows, elements), and what was lost."""

    planes: dict[str, np.ndarray]
    loss: Loss = NOTHING_LOST


class RowMaker(Protocol):
    """What a weight file is written from."""

    def rows(self, format: str, entry: Entry, expert: int, rows: slice) -> Rows:
        """Rows of an entry (of one expert if it is a stack) in a format."""
        ...


class Encoder:
    """Encodes rows of a source's entries; importances and moments steer what the quantisers keep.

    together: the most matrices of a stack that are rounded together.
    """

    def __init__(
        self,
        source: Source,
        importance: Importance | None = None,
        moments: Moments | None = None,
        together: int | None = None,
    ):
        self.source, self.importance, self.moments = source, importance, moments
        self._together = together
        self._stacked: dict[tuple[str, str, int], Rows] = {}  # of one stack

    def rows(self, format: str, entry: Entry, expert: int, rows: slice) -> Rows:
        """Rows of an entry (of one expert if it is a stack) in a format."""
        exact = self.source.exact(entry)
        if format == exact:
            return Rows(self.source.stored(entry, expert, rows.start, rows.stop))
        moment = self.moments.of(entry, expert) if self.moments and format in FED else None
        if moment is not None:
            return self._fed(format, entry, expert, moment)
        if format in QUANTISERS:
            columns = self.importance.of(entry, expert) if self.importance else None
            return Rows(*quantise(self._values(entry, expert, rows), format, columns))
        values = self.source.values(entry, expert, rows.start, rows.stop)
        return Rows({"weight": codecs.to_bf16(values) if format == "bf16" else values})

    def _fed(self, format: str, entry: Entry, expert: int, moment: Moment) -> Rows:
        """A whole matrix rounded with second moments, along with the others of its stack.

        Where a stack begins and ends depends on nothing that an interruption changes.
        """
        if (format, entry.name, expert) not in self._stacked:
            most = self._together or experts(entry)
            count = 1 if ".w2." in entry.name else min(stacked(entry), most)  # down: each its own
            first, whole = expert - expert % count, slice(0, entry.shape[-2])
            those = range(first, min(first + count, experts(entry)))
            stack = mx.stack([self._values(entry, each, whole) for each in those])
            found = quantise_stack(stack, format, moment)
            self._stacked = {
                (format, entry.name, each): Rows(*rows)
                for each, rows in zip(those, found, strict=True)
            }
        return self._stacked[format, entry.name, expert]

    def _values(self, entry: Entry, expert: int, rows: slice) -> mx.array:
        stored = self.source.stored(entry, expert, rows.start, rows.stop)
        return on_device(self.source.exact(entry), stored)


def stacked(entry: Entry) -> int:
    """How many matrices of an entry are rounded together where they have the same moments."""
    most = GPU_STACK if mx.default_device() == mx.gpu else CPU_STACK
    return max(1, most // math.prod(entry.shape[-2:]))


def row_chunks(entry: Entry, limit: int = CHUNK, whole: bool = False) -> list[tuple[int, slice]]:
    """(expert, rows) of every chunk of an entry, in file order.

    A chunk is about `limit` bytes of float32, or all rows of a matrix if `whole`.
    """
    shape = entry.shape[1:] if entry.kind == "experts" else entry.shape
    width = 4 * int(np.prod(shape[1:]))
    step = shape[0] if whole else max(1, limit // width // TILE) * TILE
    pieces = [slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
    return [(expert, rows) for expert in range(experts(entry)) for rows in pieces]
