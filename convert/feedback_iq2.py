"""The searches of IQ2_XXS with error feedback, for one group of all rows at a time.

In the first pass a group's scale level is searched among nine around its size; for each the four
eights snap in turn, and what one gets wrong is made good by those behind it. In the descent all four
snap to where the gradient vanishes, with the level as it is or one beside it.
"""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.convert.feedback import GROUP
from ds4mlx.convert.fitting import nearest, safe_divide
from ds4mlx.convert.quantise_iq2 import TOP_LEVEL, even_signs, grid_levels

# Scale levels that are tried, from the one that the size of a group suggests.
AROUND = 4
EIGHTS = range(GROUP // 8)


class Codes(NamedTuple):
    """How groups of 32 are stored, and the values that this stands for.

    level (R,), points (R, 4), minus bool (R, 32), values (R, 32).
    """

    level: mx.array
    points: mx.array
    minus: mx.array
    values: mx.array


@cache
def typical() -> float:
    """The root mean square of the grid."""
    return float(mx.sqrt(mx.square(grid_levels()).mean()))


def searched(
    x: mx.array, d: mx.array, root: mx.array, inverse: mx.array
) -> tuple[tuple[mx.array, ...], mx.array]:
    """Codes of groups x (R, 32) for scales d (R,), and their errors times the root's block (R, 32).

    root, inverse (32, 32): the group's own blocks of both.
    """
    places = [slice(8 * j, 8 * j + 8) for j in EIGHTS]
    weights = [mx.square(root[own, own]).sum(-1) for own in places]
    level = levels_near(x, d, mx.concatenate(weights))
    scale = d[:, None] * (2 * level + 1)
    rest, found, errors = mx.broadcast_to(x[:, None], (*level.shape, GROUP)), [], []
    for own, w in zip(places, weights, strict=True):
        minus, v = even_signs(rest[..., :8], w)
        points, values = snapped(v, minus, scale, w)
        errors.append((rest[..., :8] - values) @ root[own, own])
        rest = rest[..., 8:] - errors[-1] @ inverse[own, own.stop :]
        found.append((points, minus, values))
    points, minus, values = zip(*found, strict=True)
    error = mx.concatenate(errors, -1)
    best = mx.argmin(mx.square(error).sum(-1), axis=-1)
    choices = level, mx.stack(points, -1), mx.concatenate(minus, -1), mx.concatenate(values, -1)
    return tuple(chosen(each, best) for each in choices), chosen(error, best)


def levels_near(x: mx.array, d: mx.array, weights: mx.array) -> mx.array:
    """Levels (R, 9) around the ones that give the grid the size of x (R, 32)."""
    rms = mx.sqrt((weights * x * x).sum(-1) / weights.sum())
    middle = nearest(0.5 * (safe_divide(rms, d * typical()) - 1), TOP_LEVEL)
    return mx.clip(middle[:, None] + mx.arange(-AROUND, AROUND + 1), 0, TOP_LEVEL)


def snapped(
    v: mx.array, minus: mx.array, scale: mx.array, w: mx.array
) -> tuple[mx.array, mx.array]:
    """Nearest points (...) and their values (..., 8) for magnitudes v (..., 8), scales (...), w (8,).

    Nearest by the sum of w (v - s l)^2, of which w s l^2 - 2 w v l tells points apart, as s >= 0.
    """
    levels = grid_levels()
    table = mx.concatenate([(levels * levels) @ w[:, None], -2 * w * levels], -1)
    points = mx.argmin(mx.concatenate([scale[..., None], v], -1) @ table.T, axis=-1)
    values = scale[..., None] * levels[points]
    return points, mx.where(minus, -values, values)


def chosen(candidates: mx.array, best: mx.array) -> mx.array:
    """Of candidates (R, n, ...) those at best (R,)."""
    index = best.reshape(-1, *[1] * (candidates.ndim - 1))
    return mx.take_along_axis(candidates, index, axis=1)[:, 0]


def changed(
    old: tuple[mx.array, ...], g: mx.array, d: mx.array, h: mx.array, inverse: mx.array
) -> tuple[mx.array, ...]:
    """The codes of a group, better ones where there are any.

    The eights snap to where the gradient g (R, 32) vanishes, with the level and its neighbours. h,
    inverse (32, 32): the group's block of H and that block's inverse.
    """
    level, points, minus, values = old
    near = mx.clip(level[:, None] + mx.arange(-1, 2), 0, TOP_LEVEL)
    scale, goal, found = d[:, None] * (2 * near + 1), values + g @ inverse, []
    for j in EIGHTS:
        weights, x = mx.diag(h)[8 * j : 8 * j + 8], goal[:, None, 8 * j : 8 * j + 8]
        signs, v = even_signs(mx.broadcast_to(x, (*near.shape, 8)), weights)
        found.append((signs, *snapped(v, signs, scale, weights)))
    signs, snaps, parts = zip(*found, strict=True)
    new = mx.concatenate(parts, -1)
    delta = new - values[:, None]
    cost = (delta * (delta @ h - 2 * g[:, None])).sum(-1)
    best = mx.argmin(cost, axis=-1)
    better = chosen(cost, best)[:, None] < 0
    choices = near[..., None], mx.stack(snaps, -1), mx.concatenate(signs, -1), new
    pairs = zip(choices, (level[:, None], points, minus, values), strict=True)
    kept = [mx.where(better, chosen(each, best), was) for each, was in pairs]
    return kept[0][:, 0], *kept[1:]
