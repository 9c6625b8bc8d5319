"""The searches of IQ2_XXS with error feedback, for one group of 32 columns of all rows at a time.

In the first pass a group's scale level is searched among nine around its size; for each the four
eights snap in turn, and what one gets wrong is made good by those behind it. In the descent eights snap
to where the gradient vanishes: all four at once, with the level or one beside it, then each by itself.
Each search is a launch, in which a thread has a row with one of its levels.
"""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.iq2_feedback_text import CHANGED, HEADER, SEARCHED
from ds4mlx.custom_kernels.codes.iq2_nearest import POINTS, grid_levels, nearest_points
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.words import LOAD8

GROUP = 32
TOP_LEVEL = 15
# Scale levels that are tried around the one that the size of a group suggests, and around a stored one.
AROUND, BESIDE = 4, 1
# Threads of a threadgroup.
SEARCHING, CHANGING = 128, 96
EIGHTS = [slice(a, a + 8) for a in range(0, GROUP, 8)]

SEARCHED_KERNEL = Kernel(
    "iq2_searched",
    ["x", "d", "root", "inverse", "levels"],
    ["found", "points", "values", "errors"],
    SEARCHED,
    LOAD8 + POINTS + HEADER,
)
CHANGED_KERNEL = Kernel(
    "iq2_changed",
    ["level", "points", "values", "g", "d", "h", "inverse", "eighths", "levels"],
    ["new_level", "new_points", "new_values"],
    CHANGED,
    LOAD8 + POINTS + HEADER,
)


class Codes(NamedTuple):
    """How groups of 32 are stored, and the values that this stands for.

    level float32 (R,), points and signs as `nearest_points` gives them (R, 4), values (R, 32).
    """

    level: mx.array
    points: mx.array
    values: mx.array


@cache
def typical() -> float:
    """The root mean square of the grid."""
    return float(mx.sqrt(mx.square(grid_levels()).mean()))


def searched(x: mx.array, d: mx.array, root: mx.array, inverse: mx.array) -> tuple[Codes, mx.array]:
    """Codes of groups x float32 (R, 32) for scales d (R,), and their errors times the root's block (R, 32).

    root, inverse (32, 32): the group's own blocks of both, upper triangular.
    """
    suits = dispatch.active(x, "iq2_searched")
    return (searched_by_kernel if suits else searched_plain)(x, d, root, inverse)


def changed(
    old: Codes, g: mx.array, d: mx.array, h: mx.array, inverse: mx.array, eighths: mx.array
) -> Codes:
    """The codes of a group, better ones where there are any.

    First all of it moves, with the level or one beside it, then one eight after another. g (R, 32):
    the gradient; h, inverse (32, 32): the group's block of H and its inverse; eighths (4, 8, 8): the
    inverses of the blocks in that.
    """
    suits = dispatch.active(g, "iq2_changed")
    return (changed_by_kernel if suits else changed_plain)(old, g, d, h, inverse, eighths)


def searched_by_kernel(
    x: mx.array, d: mx.array, root: mx.array, inverse: mx.array
) -> tuple[Codes, mx.array]:
    """`searched` in one launch."""
    rows, floats = len(x), mx.float32
    outputs = [
        ((rows,), floats),
        ((rows, 4), mx.uint32),
        ((rows, 32), floats),
        ((rows, 32), floats),
    ]
    template = [("LEVELS", 2 * AROUND + 1), ("TOP", TOP_LEVEL), ("TYPICAL", bits(typical()))]
    groups, more = _grid(rows, SEARCHING, 2 * AROUND + 1)
    *codes, errors = SEARCHED_KERNEL(
        [x, d, root, inverse, grid_levels()],
        outputs,
        groups=groups,
        threads=SEARCHING,
        template=template + more,
    )
    return Codes(*codes), errors


def changed_by_kernel(
    old: Codes, g: mx.array, d: mx.array, h: mx.array, inverse: mx.array, eighths: mx.array
) -> Codes:
    """`changed` in one launch."""
    groups, more = _grid(len(g), CHANGING, 2 * BESIDE + 1)
    return Codes(
        *CHANGED_KERNEL(
            [*old, g, d, h, inverse, eighths, grid_levels()],
            [(each.shape, each.dtype) for each in old],
            groups=groups,
            threads=CHANGING,
            template=[("LEVELS", 2 * BESIDE + 1), ("TOP", TOP_LEVEL), *more],
        )
    )


def _grid(
    rows: int, threads: int, levels: int
) -> tuple[tuple[int, int, int], list[tuple[str, int]]]:
    """Threadgroups for rows, of each of which so many levels are tried, and what the text is told."""
    each = threads // levels
    return (-(-rows // each), 1, 1), [("THREADS", threads), ("EACH", each)]


def searched_plain(
    x: mx.array, d: mx.array, root: mx.array, inverse: mx.array
) -> tuple[Codes, mx.array]:
    """`searched` by MLX's own operations."""
    squares = mx.square(root)
    weights = mx.stack([squares[own, own].sum(-1) for own in EIGHTS])
    level = levels_near(x, d, weights.reshape(-1))
    scale = d[:, None] * (2 * level + 1)
    rest, points, values, errors = mx.broadcast_to(x[:, None], (*level.shape, GROUP)), [], [], []
    for j, own in enumerate(EIGHTS):
        eight = rest[..., None, :8]
        found = nearest_points(eight, scale, weights[j : j + 1])
        points.append(found[0])
        values.append(found[1][..., 0, :])
        errors.append((eight[..., 0, :] - values[-1]) @ root[own, own])
        if own.stop < GROUP:
            rest = mx.addmm(rest[..., 8:], errors[-1], inverse[own, own.stop :], alpha=-1)
    error = mx.concatenate(errors, -1)
    best = mx.argmin(mx.square(error).sum(-1), axis=-1)
    choices = level, mx.concatenate(points, -1), mx.concatenate(values, -1)
    return Codes(*(chosen(each, best) for each in choices)), chosen(error, best)


def levels_near(x: mx.array, d: mx.array, weights: mx.array) -> mx.array:
    """Levels (R, 9) around the ones that give the grid the size of x (R, 32)."""
    rms, size = mx.sqrt((mx.square(x) @ weights) / weights.sum()), d * typical()
    share = mx.where(size == 0, 0.0, rms / mx.where(size == 0, 1.0, size))
    middle = mx.clip(mx.round(0.5 * (share - 1)), 0, TOP_LEVEL)
    return mx.clip(middle[:, None] + mx.arange(-AROUND, AROUND + 1), 0, TOP_LEVEL)


def chosen(candidates: mx.array, best: mx.array) -> mx.array:
    """Of candidates (R, n, ...) those at best (R,)."""
    index = best.reshape(-1, *[1] * (candidates.ndim - 1))
    return mx.take_along_axis(candidates, index, axis=1)[:, 0]


def changed_plain(
    old: Codes, g: mx.array, d: mx.array, h: mx.array, inverse: mx.array, eighths: mx.array
) -> Codes:
    """`changed` by MLX's own operations."""
    new = _group_moved(old, g, d, h, inverse)
    g = mx.addmm(g, new.values - old.values, h, alpha=-1)
    return _eights_moved(new, g, d, h, eighths)


def _group_moved(old: Codes, g: mx.array, d: mx.array, h: mx.array, inverse: mx.array) -> Codes:
    """The eights snap to where the gradient vanishes, all at once, where that is better."""
    near = mx.clip(old.level[:, None] + mx.arange(-BESIDE, BESIDE + 1), 0, TOP_LEVEL)
    goal = mx.addmm(old.values, g, inverse).reshape(-1, 1, 4, 8)
    goal = mx.broadcast_to(goal, (*near.shape, 4, 8))
    points, values = nearest_points(goal, d[:, None] * (2 * near + 1), mx.diag(h).reshape(4, 8))
    values = values.flatten(-2)
    delta = values - old.values[:, None]
    cost = (delta * mx.addmm(g[:, None], delta, h, alpha=0.5, beta=-1)).sum(-1)
    best = mx.argmin(cost, axis=-1)
    better = chosen(cost, best) < 0
    choices = near, points, values
    return Codes(
        *(
            mx.where(better.reshape(-1, *[1] * (was.ndim - 1)), chosen(each, best), was)
            for each, was in zip(choices, old, strict=True)
        )
    )


def _eights_moved(old: Codes, g: mx.array, d: mx.array, h: mx.array, eighths: mx.array) -> Codes:
    """Each eight snaps to where the gradient vanishes, where that is better; the level stays."""
    scale, weights = d * (2 * old.level + 1), mx.diag(h).reshape(4, 8)
    points, values = [], []
    for j, own in enumerate(EIGHTS):
        was, slope = old.values[:, own], g[:, own]
        goal = mx.addmm(was, slope, eighths[j])
        point, value = nearest_points(goal[:, None], scale, weights[j : j + 1])
        delta = value[:, 0] - was
        cost = delta * mx.addmm(slope, delta, h[own, own], alpha=0.5, beta=-1)
        better = cost.sum(-1, keepdims=True) < 0
        points.append(mx.where(better, point, old.points[:, j : j + 1]))
        values.append(mx.where(better, value[:, 0], was))
        if own.stop < GROUP:
            g = mx.addmm(g, values[-1] - was, h[own], alpha=-1)
    return Codes(old.level, mx.concatenate(points, -1), mx.concatenate(values, -1))
