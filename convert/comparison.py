"""Compares a stored weight with its source: equal where the format is exact, else within a bound.

A matrix that was quantised must have the relative error that its conversion noted in the manifest.
Without a note its format's bound decides, which lies above what a right quantisation of unusual
weights reaches and below what an unrelated matrix of the same size gives (about 1.4).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ds4mlx.convert.encoder import Encoder, row_chunks
from ds4mlx.convert.quantise import QUANTISERS, decode, ratio
from ds4mlx.convert.sources import Source
from ds4mlx.formats import TAGS
from ds4mlx.weights.directory import Plane, planes
from ds4mlx.weights.inventory import Entry
from ds4mlx.weights.tensor_file import TensorFile

# Largest relative error of one matrix. Normal weights give 0.35, 0.3 and 0.08; matrices of few large
# values, which suit IQ2_XXS worst, 1.1 there, as columns without importance take any point, and 0.4 in
# Q2_K. Another matrix of the same size is off by 1.39 or more.
BOUNDS = {"iq2_xxs": 1.25, "q2_k": 0.75, "q4_k": 0.3}
# How closely a relative error agrees with the one noted, which was summed in float32.
AGREE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """The relative error of a weight, the largest that passes, and why it fails (None: it passes)."""

    error: float
    bound: float
    cause: str | None


class Difference(NamedTuple):
    """Rows of one matrix against their source: squared difference and squared source."""

    expert: int
    error: float
    size: float


def compare(file: TensorFile, entry: Entry, listed: dict[str, Any], source: Source) -> Comparison:
    """Compare an entry of a weight file with its source; `listed`: what the manifest says of it."""
    name = listed["format"]
    if listed["lossless"] or name not in QUANTISERS:
        return _compare_equal(file, entry, listed, source)
    matrices: dict[int, list[Difference]] = {}
    for part in _differences(file, entry, name, source):
        matrices.setdefault(part.expert, []).append(part)
    error = _relative([part for parts in matrices.values() for part in parts])
    errors = [_relative(each) for each in matrices.values()]
    noted = listed.get("relative_errors")
    if noted is None:
        return Comparison(error, BOUNDS[name], _beyond(errors, BOUNDS[name]))
    return Comparison(error, noted["all"], _disagrees(errors, noted["matrices"]))


def _compare_equal(
    file: TensorFile, entry: Entry, listed: dict[str, Any], source: Source
) -> Comparison:
    """A format that does not quantise holds exactly what encoding the source again gives."""
    name = listed["format"]
    equal = _same_bytes(file, entry, name, source)
    if equal and listed["lossless"]:
        return Comparison(0.0, 0.0, None)
    error = _relative(list(_differences(file, entry, name, source)))
    passes = error == 0 if equal is None else equal
    cause = f"its relative error is {error:.3g}, and some values are not what the source gives"
    bound = error if passes else 0.0
    return Comparison(error, bound, None if passes else cause)


def _relative(parts: list[Difference]) -> float:
    return ratio(sum(part.error for part in parts), sum(part.size for part in parts))


def _beyond(errors: list[float], bound: float) -> str | None:
    worst = max(range(len(errors)), key=lambda e: np.nan_to_num(errors[e], nan=np.inf))
    if errors[worst] <= bound:
        return None
    return f"the relative error of matrix {worst} is {errors[worst]:.3g}, above {bound:g}"


def _disagrees(errors: list[float], noted: list[float]) -> str | None:
    for matrix, (error, was) in enumerate(zip(errors, noted, strict=True)):
        if not abs(error - was) <= AGREE * was:
            return f"the relative error of matrix {matrix} is {error:.3g}, and was {was:.3g} when converted"
    return None


def _same_bytes(file: TensorFile, entry: Entry, name: str, source: Source) -> bool | None:
    """Whether the planes have the bytes that encoding the source gives; None if it has no such form."""
    if name not in ("f32", "bf16", source.exact(entry)):
        return None
    encoder = Encoder(source)
    for expert, rows in row_chunks(entry):
        wanted = encoder.rows(name, entry, expert, rows).planes
        stored = stored_rows(file, entry, name, expert, rows)
        if any(stored[plane].tobytes() != wanted[plane].tobytes() for plane in stored):
            return False
    return True


def _differences(file: TensorFile, entry: Entry, name: str, source: Source) -> Iterator[Difference]:
    """Every chunk of rows against the source, both decoded exactly."""
    for expert, rows in row_chunks(entry):
        wanted = source.values(entry, expert, rows.start, rows.stop).astype(np.float64)
        gap = decode(name, stored_rows(file, entry, name, expert, rows)) - wanted
        yield Difference(expert, float((gap**2).sum()), float((wanted**2).sum()))


def stored_rows(
    file: TensorFile, entry: Entry, name: str, expert: int, rows: slice
) -> dict[str, np.ndarray]:
    """Rows of an entry (of one expert if it is a stack) as the planes that a file holds."""
    return {p.plane: plane_rows(file, p, entry, expert, rows) for p in planes(entry, name)}


def plane_rows(
    file: TensorFile, plane: Plane, entry: Entry, expert: int, rows: slice
) -> np.ndarray:
    """Rows of a stored plane, of one expert if it is a stack."""
    per_matrix = entry.shape[-2] if entry.kind == "experts" else 0
    width = plane.shape[-1] if len(plane.shape) > 1 else 1
    dtype = TAGS[plane.dtype].numpy
    row_bytes = width * np.dtype(dtype).itemsize
    count = rows.stop - rows.start
    raw = file.read(plane.name, (expert * per_matrix + rows.start) * row_bytes, count * row_bytes)
    values = np.frombuffer(raw, dtype)
    return values.reshape(count, width) if len(plane.shape) > 1 else values
