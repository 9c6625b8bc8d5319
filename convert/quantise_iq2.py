"""IQ2_XXS: eight weights at a time snap to one of 256 grid points, with signs and a shared scale.

Like ggml's quantiser, with two searches made exhaustive instead of local: every one of the 256 points
is considered, and the points are chosen once more for the scale that is finally stored. The
distance to a point is quadratic in the scale, so two matrix products serve all candidate scales.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.convert.fitting import fit_scale, halved, nearest, safe_divide
from ds4mlx.formats.iq import iq2_grid

# Candidate scales a group of 32 tries, as the size of three levels' step in units of the first.
CANDIDATES = [5 + 0.1 * k for k in range(-6, 7)]
TOP_LEVEL = 15


@dataclass(frozen=True)
class Groups:
    """Groups of 32 weights (G, 32) ready for the search: magnitudes v (one may be negative, to make
    the count of minus signs even), weights w, and the products that give distances."""

    v: mx.array
    w: mx.array
    squares: mx.array  # (G, 4, 256) sum of weights times squared levels
    products: mx.array  # (G, 4, 256) sum of weights times magnitude times level


def quantise_iq2(x: mx.array, importance: mx.array) -> dict[str, np.ndarray]:
    """Planes of blocks x (N, 256) with the importance of every weight."""
    w = importance * mx.sqrt((x * x).mean(-1, keepdims=True) + x * x)
    minus, v = even_signs(x.reshape(-1, 8), w.reshape(-1, 8))
    groups = prepare(v, w.reshape(-1, 8))
    scale = best_scale(groups).reshape(len(x), 8)
    d = halved(scale.max(-1, keepdims=True) / (2 * TOP_LEVEL + 1))
    level = nearest(0.5 * (safe_divide(scale, d) - 1), TOP_LEVEL)
    points = snap(groups, (d * (2 * level + 1)).reshape(-1, 1))
    return {
        "weight": words(points, minus.reshape(-1, 4, 8), level.reshape(-1)).reshape(len(x), 16),
        "d": np.array(d.astype(mx.float16)),
    }


def even_signs(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
    """(where a minus is stored, what the magnitudes then should be), for eights (M, 8).

    An odd count of minus signs cannot be stored: the sign that matters least is flipped.
    """
    minus = x < 0
    odd = minus.astype(mx.int32).sum(-1, keepdims=True) % 2 == 1
    weakest = mx.arange(8) == mx.argmin(w * x * x, axis=-1, keepdims=True)
    minus = mx.not_equal(minus, weakest & odd)
    return minus, mx.where(minus, -x, x)


def prepare(v: mx.array, w: mx.array) -> Groups:
    """The products of magnitudes and weights (M, 8) with all grid points."""
    levels, w_root = grid_levels(), mx.sqrt(w)
    squares = w_root @ (levels * levels).T
    products = (w_root * v) @ levels.T
    per_group = (-1, 4, 256)
    return Groups(
        v.reshape(-1, 32),
        w.reshape(-1, 32),
        squares.reshape(per_group),
        products.reshape(per_group),
    )


def grid_levels() -> mx.array:
    """The grid in the levels 1, 3, 5 that the search works with, (256, 8)."""
    return 2 * mx.round((iq2_grid() - 8) / 17) + 1


def best_scale(groups: Groups) -> mx.array:
    """The scale of every group (G,) with the best weighted fit; 0 where nothing fits."""
    first, _ = fit_scale(mx.maximum(groups.v, 0), groups.w, 4)
    best, scale = mx.full(first.shape, -1.0), mx.zeros_like(first)
    for candidate in CANDIDATES:
        best, scale = _try(groups, 3 * first / candidate, best, scale)
        mx.eval(best, scale)
    return _try(groups, scale, best, scale)[1]


def _try(groups: Groups, tried: mx.array, best: mx.array, scale: mx.array):
    """Snap with the scale `tried`, fit the scale to the points, and keep it where it scores better."""
    levels = grid_levels()[snap(groups, tried[:, None])].reshape(groups.v.shape)
    xq = (groups.w * groups.v * levels).sum(-1)
    qq = (groups.w * levels * levels).sum(-1)
    score = mx.where(xq > 0, safe_divide(xq * xq, qq), -1.0)
    better = score > best
    return mx.where(better, score, best), mx.where(better, safe_divide(xq, qq), scale)


def snap(groups: Groups, scale: mx.array) -> mx.array:
    """Index of the best grid point of every eight, (G, 4), for scales (G, 1)."""
    scale = scale[..., None]
    return mx.argmin(scale * (scale * groups.squares - 2 * groups.products), axis=-1)


def words(points: mx.array, minus: mx.array, level: mx.array) -> np.ndarray:
    """The two words of every group, uint32 (G, 2): four points; four 7-bit signs below the level."""
    index = np.array(points.astype(mx.uint32))
    signs = np.packbits(np.array(minus), axis=-1, bitorder="little")[..., 0].astype(np.uint32) & 127
    shifts = np.arange(4, dtype=np.uint32)
    first = np.bitwise_or.reduce(index << shifts * np.uint32(8), axis=-1)
    second = np.bitwise_or.reduce(signs << shifts * np.uint32(7), axis=-1)
    top = np.array(level).astype(np.uint32) << np.uint32(28)
    return np.stack([first, second | top], axis=-1)
