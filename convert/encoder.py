"""From rows of a source tensor to rows of the planes that a format keeps, and back."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ds4mlx.convert import codecs
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.quantise import QUANTISERS, Loss, on_device, quantise
from ds4mlx.convert.quantise_fed import FED, quantise_fed
from ds4mlx.convert.sources import Source
from ds4mlx.weights.inventory import Entry, experts

# float32 bytes that a chunk of rows may take; rows come in multiples of 128, the height of a tile.
CHUNK = 32 << 20
TILE = 128
NOTHING_LOST = Loss()


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
    """Encodes rows of a source's entries; importances and moments steer what the quantisers keep."""

    def __init__(
        self, source: Source, importance: Importance | None = None, moments: Moments | None = None
    ):
        self.source, self.importance, self.moments = source, importance, moments

    def rows(self, format: str, entry: Entry, expert: int, rows: slice) -> Rows:
        """Rows of an entry (of one expert if it is a stack) in a format."""
        exact = self.source.exact(entry)
        if format == exact or format in QUANTISERS:
            stored = self.source.stored(entry, expert, rows.start, rows.stop)
            if format == exact:
                return Rows(stored)
            values = on_device(exact, stored)
            moment = self.moments.of(entry, expert) if self.moments and format in FED else None
            if moment is not None:
                return Rows(*quantise_fed(values, format, moment))
            columns = self.importance.of(entry, expert) if self.importance else None
            return Rows(*quantise(values, format, columns))
        values = self.source.values(entry, expert, rows.start, rows.stop)
        return Rows({"weight": codecs.to_bf16(values) if format == "bf16" else values})


def row_chunks(entry: Entry, limit: int = CHUNK, whole: bool = False) -> list[tuple[int, slice]]:
    """(expert, rows) of every chunk of an entry, in file order.

    A chunk is about `limit` bytes of float32, or all rows of a matrix if `whole`.
    """
    shape = entry.shape[1:] if entry.kind == "experts" else entry.shape
    width = 4 * int(np.prod(shape[1:]))
    step = shape[0] if whole else max(1, limit // width // TILE) * TILE
    pieces = [slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
    return [(expert, rows) for expert in range(experts(entry)) for rows in pieces]
