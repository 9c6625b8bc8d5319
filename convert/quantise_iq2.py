"""IQ2_XXS: eight weights at a time snap to one of 256 grid points, with signs and a shared scale.

Like ggml's quantiser, with two searches made exhaustive instead of local: every one of the 256 points
is considered, and the points are chosen once more for the scale that is finally stored. The
distances of all eights to all points are one matrix product.
"""

from typing import NamedTuple

import mlx.core as mx

from ds4mlx.convert.fitting import fit_scale, halved, nearest, safe_divide
from ds4mlx.custom_kernels.codes.iq2_feedback import TOP_LEVEL
from ds4mlx.custom_kernels.codes.iq2_nearest import even_signs, grid_levels

# Scales that a group of 32 tries, relative to the first guess.
CANDIDATES = [3 / (3.5 + 0.5 * k) for k in range(7)]


class Groups(NamedTuple):
    """Groups of 32 weights ready for the search, in rows of eight.

    v: magnitudes (M, 8), one may be negative, to make the count of minus signs even; w: weights.
    """

    v: mx.array
    w: mx.array


def quantise_iq2(x: mx.array, importance: mx.array) -> dict[str, mx.array]:
    """Planes of blocks x (N, 256) with the importance of every weight."""
    minus, groups = prepare(x, importance)
    return stored(minus, *settled(groups, best_scale(groups)))


def settled(groups: Groups, scale: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """For scales (32-groups,): d (N, 1), levels (N, 8), and the points chosen once more for them."""
    scale = scale.reshape(-1, 8)
    d = halved(scale.max(-1, keepdims=True) / (2 * TOP_LEVEL + 1))
    level = nearest(0.5 * (safe_divide(scale, d) - 1), TOP_LEVEL)
    return d, level, snap(groups, (d * (2 * level + 1)).reshape(-1))


def stored(minus: mx.array, d: mx.array, level: mx.array, points: mx.array) -> dict[str, mx.array]:
    """Planes of d (N, 1), levels (N, 8), and points and signs of eights, (32 N,) and (32 N, 8)."""
    packed = words(points.reshape(-1, 4), minus.reshape(-1, 4, 8), level.reshape(-1))
    return {"weight": packed.reshape(len(d), 16), "d": d.astype(mx.float16)}


def prepare(x: mx.array, importance: mx.array) -> tuple[mx.array, Groups]:
    """Where blocks x (N, 256) store a minus, (32 N, 8), and their groups."""
    w = (importance * mx.sqrt((x * x).mean(-1, keepdims=True) + x * x)).reshape(-1, 8)
    minus, v = even_signs(x.reshape(-1, 8), w)
    return minus, Groups(v, w)


def best_scale(groups: Groups) -> mx.array:
    """The scale of every group (G,) with the best weighted fit; 0 where nothing fits."""
    v, w = (mx.contiguous(side.reshape(-1, 32).T) for side in groups)
    first, _ = fit_scale(mx.maximum(v, 0), w, 4, [0])
    best, scale = mx.full(first.shape, -1.0), mx.zeros_like(first)
    for candidate in CANDIDATES:
        best, scale = _try(groups, candidate * first, best, scale)
        mx.eval(best, scale)
    return _try(groups, scale, best, scale)[1]


def _try(groups: Groups, tried: mx.array, best: mx.array, scale: mx.array):
    """Snap with the scale `tried`, fit the scale to the points, and keep it where it scores better."""
    levels = grid_levels()[snap(groups, tried)]
    xq = (groups.w * groups.v * levels).reshape(-1, 32).sum(-1)
    qq = (groups.w * levels * levels).reshape(-1, 32).sum(-1)
    score = mx.where(xq > 0, safe_divide(xq * xq, qq), -1.0)
    better = score > best
    return mx.where(better, score, best), mx.where(better, safe_divide(xq, qq), scale)


def snap(groups: Groups, scale: mx.array) -> mx.array:
    """Index of the nearest grid point of every eight, (M,), for scales (G,).

    Nearest by sum of sqrt(w) (v - s l)^2, of which only s l^2 - 2 v l tells points apart.
    """
    w_root, levels = mx.sqrt(groups.w), grid_levels()
    scaled = mx.repeat(scale, 4)[:, None] * w_root
    sides = mx.concatenate([scaled, -2 * w_root * groups.v], axis=-1)
    return mx.argmin(sides @ mx.concatenate([levels * levels, levels], axis=-1).T, axis=-1)


def words(points: mx.array, minus: mx.array, level: mx.array) -> mx.array:
    """The two words of every group, uint32 (G, 2): four points; four 7-bit signs below the level."""
    places = mx.arange(4, dtype=mx.uint32)
    first = (points.astype(mx.uint32) << 8 * places).sum(-1)
    signs = (minus[..., :7].astype(mx.uint32) << mx.arange(7, dtype=mx.uint32)).sum(-1)
    second = (signs << 7 * places).sum(-1) | level.astype(mx.uint32) << 28
    return mx.stack([first, second], axis=-1)
