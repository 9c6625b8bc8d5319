"""Weighted least-squares fits shared by the quantisers, vectorised over blocks.

Arrays are float32 (..., n): values x and weights w of n elements that share a scale. All loops are
over candidates or elements, never over blocks.
"""

from collections.abc import Sequence

import mlx.core as mx

SWEEPS = 5


def nearest(x: mx.array, top: int) -> mx.array:
    """x rounded to the nearest integer, clamped to 0..top."""
    return mx.clip(mx.round(x), 0, top)


def safe_divide(a: mx.array, b: mx.array) -> mx.array:
    """a / b, and 0 where b is 0."""
    return mx.where(b == 0, 0.0, a / mx.where(b == 0, 1.0, b))


def halved(x: mx.array) -> mx.array:
    """x as half precision stores it, in float32."""
    return x.astype(mx.float16).astype(mx.float32)


def fit_scale(x: mx.array, w: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """Scale s (...) and levels l in 0..top (..., n) that make w (x - s l)^2 small, for x >= 0.

    Nine scales around max(x) / top are tried; then each level in turn is moved to the best one for
    the scale that the others ask for, kept where the fit improves.
    """
    largest = x.max(-1, keepdims=True)
    best, best_error = mx.zeros_like(largest), mx.full(largest.shape, mx.inf)
    for i in range(-4, 5):
        inverse = safe_divide(mx.array(top + 0.1 * i), largest)
        levels = nearest(x * inverse, top)
        error = (w * (x - safe_divide(levels, inverse)) ** 2).sum(-1, keepdims=True)
        best = mx.where(error < best_error, inverse, best)
        best_error = mx.minimum(error, best_error)
    return _coordinate_descent(x, w, nearest(x * best, top), top)


def _coordinate_descent(
    x: mx.array, w: mx.array, levels: mx.array, top: int
) -> tuple[mx.array, mx.array]:
    """Move one level at a time to its best value for the scale that all the others ask for."""
    columns = [levels[..., i] for i in range(levels.shape[-1])]
    xl, ll = (w * x * levels).sum(-1), (w * levels * levels).sum(-1)
    for _ in range(SWEEPS):
        for i, level in enumerate(columns):
            xi, wi = x[..., i], w[..., i]
            rest_xl, rest_ll = xl - wi * xi * level, ll - wi * level * level
            new = nearest(safe_divide(xi * rest_ll, rest_xl), top)
            new_xl, new_ll = rest_xl + wi * xi * new, rest_ll + wi * new * new
            better = (rest_xl > 0) & (rest_ll > 0) & (new_xl**2 * ll > xl**2 * new_ll)
            columns[i] = mx.where(better, new, level)
            xl, ll = mx.where(better, new_xl, xl), mx.where(better, new_ll, ll)
        mx.eval(columns, xl, ll)
    return safe_divide(xl, ll), mx.stack(columns, axis=-1)


def fit_affine(
    x: mx.array, w: mx.array, top: int, steps: Sequence[float], absolute: bool = False
) -> tuple[mx.array, mx.array]:
    """Scale s and offset m >= 0, each (...), that make w |x + m - s l|^p small for l in 0..top.

    For every candidate number of steps over the range the levels are rounded and the weighted
    two-parameter least squares solved; the lowest error wins. p is 2, or 1 if `absolute`.
    """
    offset = mx.minimum(x.min(-1, keepdims=True), 0)
    largest = x.max(-1, keepdims=True)
    scale = (largest - offset) / top
    sums = w.sum(-1, keepdims=True), (w * x).sum(-1, keepdims=True)
    best = _error(x, w, scale, offset, nearest(safe_divide(x - offset, scale), top), absolute)
    for step in steps:
        levels = nearest(safe_divide((x - offset) * (top + step), largest - offset), top)
        solved, new_scale, new_offset = _solve(x, w, levels, *sums)
        error = _error(x, w, new_scale, new_offset, levels, absolute)
        better = solved & (error < best)
        scale, offset = mx.where(better, new_scale, scale), mx.where(better, new_offset, offset)
        best = mx.where(better, error, best)
    return scale[..., 0], -offset[..., 0]


def _solve(
    x: mx.array, w: mx.array, levels: mx.array, weight: mx.array, wx: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(solvable, scale, offset <= 0) of the weighted least squares x = scale levels + offset."""
    wl = w * levels
    l1, l2 = wl.sum(-1, keepdims=True), (wl * levels).sum(-1, keepdims=True)
    xl = (wl * x).sum(-1, keepdims=True)
    determinant = weight * l2 - l1 * l1
    offset = safe_divide(l2 * wx - l1 * xl, determinant)
    both = safe_divide(weight * xl - wx * l1, determinant)
    scale = mx.where(offset > 0, safe_divide(xl, l2), both)
    return determinant > 0, scale, mx.minimum(offset, 0)


def _error(
    x: mx.array,
    w: mx.array,
    scale: mx.array,
    offset: mx.array,
    levels: mx.array,
    absolute: bool,
) -> mx.array:
    gap = scale * levels + offset - x
    return (w * (mx.abs(gap) if absolute else gap * gap)).sum(-1, keepdims=True)
