"""The searches of IQ2_XXS with error feedback, for one group of all rows at a time.

In the first pass a group's scale level is searched among nine around its size; for each the four
eights snap in turn, and what one gets wrong is made good by those behind it. In the descent eights snap
to where the gradient vanishes: all four at once, with the level or one beside it, then each by itself.
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
        found.append(_nearest(rest[..., :8], scale, w))
        errors.append((rest[..., :8] - found[-1][2]) @ root[own, own])
        rest = rest[..., 8:] - errors[-1] @ inverse[own, own.stop :]
    points, minus, values = map(list, zip(*found, strict=True))
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
    old: tuple[mx.array, ...],
    g: mx.array,
    d: mx.array,
    h: mx.array,
    inverse: mx.array,
    eighths: mx.array,
) -> tuple[mx.array, ...]:
    """The codes of a group, better ones where there are any.

    First all of it moves, with the level or one beside it, then one eight after another. g (R, 32):
    the gradient; h, inverse (32, 32): the group's block of H and its inverse; eighths (4, 8, 8): the
    inverses of the blocks in that.
    """
    new = Codes(*_group_moved(Codes(*old), g, d, h, inverse))
    return _eights_moved(new, g - (new.values - old[3]) @ h, d, h, eighths)


def _group_moved(
    old: Codes, g: mx.array, d: mx.array, h: mx.array, inverse: mx.array
) -> list[mx.array]:
    """The eights snap to where the gradient vanishes, all at once, where that is better."""
    near = mx.clip(old.level[:, None] + mx.arange(-1, 2), 0, TOP_LEVEL)
    scale, goal, found = d[:, None] * (2 * near + 1), (old.values + g @ inverse)[:, None], []
    for j in EIGHTS:
        at = slice(8 * j, 8 * j + 8)
        x = mx.broadcast_to(goal[..., at], (*near.shape, 8))
        found.append(_nearest(x, scale, mx.diag(h)[at]))
    points, minus, values = map(list, zip(*found, strict=True))
    new = mx.concatenate(values, -1)
    delta = new - old.values[:, None]
    cost = (delta * (delta @ h - 2 * g[:, None])).sum(-1)
    best = mx.argmin(cost, axis=-1)
    better = chosen(cost, best) < 0
    choices = near, mx.stack(points, -1), mx.concatenate(minus, -1), new
    return [
        mx.where(better.reshape(-1, *[1] * (was.ndim - 1)), chosen(each, best), was)
        for each, was in zip(choices, old, strict=True)
    ]


def _eights_moved(
    old: Codes, g: mx.array, d: mx.array, h: mx.array, eighths: mx.array
) -> tuple[mx.array, ...]:
    """Each eight snaps to where the gradient vanishes, where that is better; the level stays."""
    scale, found = d * (2 * old.level + 1), []
    for j in EIGHTS:
        at = slice(8 * j, 8 * j + 8)
        point, minus, values = old.points[:, j], old.minus[:, at], old.values[:, at]
        snap = _nearest(values + g[:, at] @ eighths[j], scale, mx.diag(h)[at])
        delta = snap[2] - values
        better = (delta * (delta @ h[at, at] - 2 * g[:, at])).sum(-1, keepdims=True) < 0
        g = g - mx.where(better, delta, 0) @ h[at]
        pairs = zip(snap[1:], (minus, values), strict=True)
        kept = [mx.where(better, new, was) for new, was in pairs]
        found.append((mx.where(better[:, 0], snap[0], point), *kept))
    points, minus, values = map(list, zip(*found, strict=True))
    parts = mx.stack(points, -1), mx.concatenate(minus, -1), mx.concatenate(values, -1)
    return old.level, *parts


def _nearest(x: mx.array, scale: mx.array, w: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Points, signs and values nearest to x (..., 8), for scales (...) and weights (8,)."""
    minus, v = even_signs(x, w)
    points, values = snapped(v, minus, scale, w)
    return points, minus, values
