"""Quantisers by format, and the two functions that go from values to planes and back."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ds4mlx.convert.quantise_iq2 import quantise_iq2
from ds4mlx.convert.quantise_k import Q2_K, Q4_K, q2_k_planes, q4_k_planes, quantise_k
from ds4mlx.custom_kernels.codes import iq2_feedback, iq2_feedback_text, iq2_nearest
from ds4mlx.errors import DataError
from ds4mlx.formats import DTYPES, FORMATS
from ds4mlx.formats.gguf_blocks import BLOCK_BYTES, block_planes
from ds4mlx.precision import keep_float32

BLOCK = 256
LEAST = 2.0**-60
# The files that decide the bytes that quantising gives.
SOURCES = (
    *("quantise.py", "quantise_iq2.py", "quantise_k.py", "fitting.py"),
    *("quantise_fed.py", "feedback.py", "rounding_iq2.py", "rounding_k.py"),
)
# Blocks quantised at a time: the search of IQ2_XXS takes about 64 KB of scratch a block.
CPU_BATCH, GPU_BATCH = 1 << 9, 1 << 15

Quantiser = Callable[[mx.array, mx.array | None], dict[str, mx.array]]


class Loss(NamedTuple):
    """Sums of squares over a matrix: of what was lost and of the values, weighted and plain."""

    weighted_error: float = 0.0
    weighted_size: float = 0.0
    error: float = 0.0
    size: float = 0.0

    def plus(self, other: "Loss") -> "Loss":
        """Of both matrices together."""
        return Loss(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def relative(self) -> float:
        """The relative error, |stored - source| / |source|."""
        return ratio(self.error, self.size)

    @property
    def weighted(self) -> float:
        """The relative error with every column weighted by its importance."""
        return ratio(self.weighted_error, self.weighted_size)


def ratio(error: float, size: float) -> float:
    """The root of a sum of squared differences relative to one of squared values."""
    return (error / size) ** 0.5 if size else error**0.5


@dataclass(frozen=True)
class Quantised:
    """A matrix in a block format: planes (rows, elements), as NumPy arrays."""

    format: str
    planes: Mapping[str, np.ndarray]


@cache
def quantisers_version() -> str:
    """Digest of the quantisers' source: rows of two versions must never meet in one file."""
    searches = (Path(str(each.__file__)) for each in (iq2_nearest, iq2_feedback, iq2_feedback_text))
    paths = [*(Path(__file__).with_name(name) for name in SOURCES), *searches]
    texts = (path.read_bytes() for path in paths)
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def _iq2(x: mx.array, importance: mx.array | None) -> dict[str, mx.array]:
    assert importance is not None
    return quantise_iq2(x, importance)


QUANTISERS: dict[str, Quantiser] = {
    "iq2_xxs": _iq2,
    "q2_k": lambda x, importance: q2_k_planes(quantise_k(x, importance, Q2_K)),
    "q4_k": lambda x, importance: q4_k_planes(quantise_k(x, importance, Q4_K)),
}


def quantise(
    values: mx.array, format: str, importance: np.ndarray | None
) -> tuple[dict[str, np.ndarray], Loss]:
    """Planes of values (rows, columns) float32, and what was lost.

    importance: float32 (columns,) or None. IQ2_XXS then takes the columns' own energy, as ds4 does;
    the K formats their unweighted search. A block without any importance is quantised evenly, instead
    of to zeros. The weights of the loss are the importances that were used.
    Raises DataError if half precision cannot hold the scales.
    """
    keep_float32()
    weight = None if importance is None else np.asarray(importance, np.float32)
    if importance is None and format == "iq2_xxs":
        weight = np.array((values * values).sum(0))
    rows, columns = values.shape
    blocks = values.reshape(-1, BLOCK)
    per_row = None if weight is None else Weights.of(weight)
    batch = GPU_BATCH if mx.default_device() == mx.gpu else CPU_BATCH
    parts, losses = [], []
    for start in range(0, len(blocks), batch):
        x = blocks[start : start + batch]
        places = (start + mx.arange(len(x))) % (columns // BLOCK)
        steer, weigh = per_row.at(places) if per_row else (None, mx.ones_like(x))
        parts.append(QUANTISERS[format](x, steer))
        losses.append(np.array(_loss(parts[-1], format, x, weigh)))
        mx.eval(parts[-1])
    joined = {p: np.concatenate([np.array(part[p]) for part in parts]) for p in parts[0]}
    sums = np.concatenate(losses, 1).sum(1, dtype=np.float64)
    if per_row:
        sums[:2] = np.ldexp(sums[:2], per_row.exponent)
    loss = Loss(*map(float, sums))
    if not np.isfinite(loss.error):
        raise DataError(
            f"values up to {float(mx.abs(values).max()):.3g} are too large for {format}"
        )
    return {p: a.reshape(rows, -1) for p, a in joined.items()}, loss


class Weights(NamedTuple):
    """The importances of a row, block by block, float32 (blocks, 256).

    Only their ratios matter, and products of very large or very small ones would leave float32.
    steer: each block scaled so that its largest lies in [1/4, 1), for the search; weigh: all scaled
    alike by 2^-exponent, to sum up what was lost.
    """

    steer: mx.array
    weigh: mx.array
    exponent: int

    @classmethod
    def of(cls, importance: np.ndarray) -> "Weights":
        """From importances (columns,), finite and not negative; ones for a block where all are 0."""
        blocks = importance.astype(np.float64).reshape(-1, BLOCK)
        blocks = np.where(blocks.max(-1, keepdims=True) > 0, blocks, 1.0)
        steer = np.ldexp(blocks, -_even_exponent(blocks.max(-1, keepdims=True)))
        # what is this much below the rest of its block matters as little as anything can
        steer = np.where(steer > 0, np.maximum(steer, LEAST), 0)
        exponent = int(_even_exponent(blocks.max()))
        steer, blocks = (a.astype(np.float32) for a in (steer, np.ldexp(blocks, -exponent)))
        return cls(mx.array(steer), mx.array(blocks), exponent)

    def at(self, places: mx.array) -> tuple[mx.array, mx.array]:
        """`steer` and `weigh` of the blocks at these places of their rows."""
        return self.steer[places], self.weigh[places]


def _even_exponent(largest: np.ndarray) -> np.ndarray:
    """The least even e with largest < 2^e: square roots of weights scaled by it stay exact too."""
    exponent = np.frexp(largest)[1]
    return exponent + exponent % 2


def _loss(planes: dict[str, mx.array], format: str, x: mx.array, w: mx.array) -> mx.array:
    """The four sums of `Loss` for every block (N, 256), as (4, N)."""
    gap = FORMATS[format].decode(planes) - x
    sums = [w * gap * gap, w * x * x, gap * gap, x * x]
    return mx.stack([terms.sum(-1) for terms in sums])


def on_device(format: str, planes: Mapping[str, np.ndarray]) -> mx.array:
    """The values that stored planes (rows, elements) stand for, float32; as the products see them."""
    layout = FORMATS[format].layout
    arrays = {p: mx.array(stored).view(DTYPES[layout[p][0]]) for p, stored in planes.items()}
    return FORMATS[format].decode(arrays)


def decode(format: str, planes: Mapping[str, np.ndarray]) -> np.ndarray:
    """`on_device`, as a NumPy array."""
    return np.array(on_device(format, planes))


def quantize(w: np.ndarray, type: str, importance: np.ndarray | None = None) -> Quantised:
    """Quantise a matrix (rows, columns) float32; importance (columns,) says which columns matter.

    type: "IQ2_XXS", "Q2_K" or "Q4_K". Raises DataError for another type, a width that is not a multiple
    of 256, values that are not finite, or importances that are negative or not finite.
    """
    name, w = type.lower(), np.asarray(w, np.float32)
    if name not in QUANTISERS:
        raise DataError(f"there is no quantiser for {type}; there are: {', '.join(QUANTISERS)}")
    if w.ndim != 2 or w.shape[1] % BLOCK or not w.size:
        raise DataError(f"{type} needs rows of a multiple of {BLOCK} values, not {w.shape}")
    if not np.isfinite(w).all():
        raise DataError(f"{type}: the values are not all finite")
    if importance is not None:
        importance = np.asarray(importance, np.float32)
        sound = np.isfinite(importance).all() and (importance >= 0).all()
        if importance.shape != (w.shape[1],) or not sound:
            raise DataError(f"{type}: importance must be {w.shape[1]} finite values of at least 0")
    return Quantised(name, quantise(mx.array(w), name, importance)[0])


def dequantize(q: Quantised | np.ndarray, type: str | None = None) -> np.ndarray:
    """The values that the products multiply by, float32 (rows, columns).

    q: what `quantize` gave; or raw GGUF blocks, uint8 (rows, bytes), of any supported block type, with
    `type` naming it. Raises DataError for an unknown type or a row of broken blocks.
    """
    if not isinstance(q, Quantised):
        q = _from_blocks(np.asarray(q), (type or "").lower())
    return decode(q.format, q.planes)


def _from_blocks(raw: np.ndarray, name: str) -> Quantised:
    if name not in BLOCK_BYTES:
        raise DataError(f"there is no type {name!r}; there are: {', '.join(BLOCK_BYTES)}")
    if raw.dtype != np.uint8:
        raise DataError(f"{name}: blocks are bytes, uint8, and not {raw.dtype}")
    if raw.ndim != 2 or not raw.size or raw.shape[1] % BLOCK_BYTES[name]:
        raise DataError(f"{name}: rows of {raw.shape} bytes are not blocks of {BLOCK_BYTES[name]}")
    return Quantised(name, block_planes(raw, name))
