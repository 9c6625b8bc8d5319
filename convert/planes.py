"""From rows of a source tensor to rows of the planes that a storage format keeps, and back."""

import numpy as np

from ds4mlx.convert import codecs
from ds4mlx.convert.source import Source, scale_name
from ds4mlx.inventory import Entry

# Bytes a row chunk of the source may take; rows are read in multiples of 128, the height of a tile.
CHUNK = 32 << 20
TILE = 128


def encode(
    storage: str, plane: str, source: Source, entry: Entry, expert: int, rows: slice
) -> np.ndarray:
    """Rows of one plane, as stored: (rows, elements)."""
    name, start, stop = entry.official(expert), rows.start, rows.stop
    if plane == "scales":
        if storage == "mxfp8":
            return source.tile_scales(name, start, stop)
        return source.rows(scale_name(name), start, stop)
    if storage in ("mxfp8", "mxfp4"):
        return source.rows(name, start, stop).view(np.uint32)
    values = source.values(entry, expert, start, stop)
    return codecs.to_bf16(values) if storage == "bf16" else values


def decode(storage: str, planes: dict[str, np.ndarray]) -> np.ndarray:
    """The values that planes (rows, elements) stand for: float32 (or int32 ids)."""
    stored = planes["weight"]
    if storage == "mxfp8":
        return codecs.decode_fp8(stored.view(np.uint8), planes["scales"])
    if storage == "mxfp4":
        return codecs.decode_fp4(stored.view(np.uint8), planes["scales"])
    return codecs.from_bf16(stored) if storage == "bf16" else stored


def row_chunks(entry: Entry, limit: int = CHUNK) -> list[tuple[int, slice]]:
    """(expert, rows) of every chunk of an entry, in file order, about `limit` float32 bytes each."""
    stack = entry.shape[0] if entry.kind == "experts" else 1
    shape = entry.shape[1:] if entry.kind == "experts" else entry.shape
    width = 4 * int(np.prod(shape[1:]))
    step = max(1, limit // width // TILE) * TILE
    pieces = [slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
    return [(expert, rows) for expert in range(stack) for rows in pieces]
