"""Weighted least-squares fits shared by the quantisers, vectorised over blocks.

Arrays are float32 (n, ...): values x and weights w of n elements that share a scale. That axis comes
first because GPUs sum over it fastest. All loops are over candidates, never over blocks.
"""

from collections.abc import Sequence

import mlx.core as mx

# How far from the usual number of levels the candidate scales go.
NEAR = tuple(0.25 * i for i in range(-4, 5))


def nearest(x: mx.array, top: int) -> mx.array:
    """x rounded to the nearest integer, clamped to 0..top."""
    return mx.clip(mx.round(x), 0, top)


def safe_divide(a: mx.array, b: mx.array) -> mx.array:
    """a / b, and 0 where b is 0."""
    return mx.where(b == 0, 0.0, a / mx.where(b == 0, 1.0, b))


def halved(x: mx.array) -> mx.array:
    """x as half precision stores it, in float32."""
    return x.astype(mx.float16).astype(mx.float32)


def fit_scale(
    x: mx.array, w: mx.array, top: int, steps: Sequence[float] = NEAR
) -> tuple[mx.array, mx.array]:
    """Scale s (...) and levels l in 0..top (n, ...) that make w (x - s l)^2 small, for x >= 0.

    For every candidate number of levels up to max(x) the levels are rounded; with the best scale for
    them the error is least where (sum w x l)^2 / sum w l l is largest.
    """
    largest, wx = x.max(0), w * x
    best, scale, levels = mx.full(largest.shape, -1.0), mx.zeros_like(largest), mx.zeros_like(x)
    for step in steps:
        tried = nearest(x * safe_divide(mx.array(top + step), largest), top)
        xl, ll = (wx * tried).sum(0), (w * tried * tried).sum(0)
        score = safe_divide(xl * xl, ll)
        better = score > best
        best, levels = mx.where(better, score, best), mx.where(better, tried, levels)
        scale = mx.where(better, safe_divide(xl, ll), scale)
        mx.eval(best, scale, levels)
    return scale, levels


class AffineFit:
    """The best scale s and offset m >= 0, each (...), so far for w |x + m - s l|^p, l in 0..top.

    p is 2, or 1 if `absolute`.
    """

    def __init__(self, x: mx.array, w: mx.array, top: int, absolute: bool):
        self.x, self.w, self.top, self.absolute = x, w, top, absolute
        self.wx = w * x
        self.sums = w.sum(0), self.wx.sum(0), (self.wx * x).sum(0)
        self.largest, self.low = x.max(0), mx.minimum(x.min(0), 0)
        self.scale = (self.largest - self.low) / top
        levels = nearest((x - self.low) * safe_divide(mx.array(1.0), self.scale), top)
        self.error = self.measured(levels, self.scale, self.low)

    def try_levels(self, levels: mx.array) -> None:
        """Solve the least squares for levels (n, ...); keep the result where it is better."""
        weight, wx, _ = self.sums
        wl = self.w * levels
        l1, l2, xl = wl.sum(0), (wl * levels).sum(0), (self.wx * levels).sum(0)
        determinant = weight * l2 - l1 * l1
        low = safe_divide(l2 * wx - l1 * xl, determinant)
        both = safe_divide(weight * xl - wx * l1, determinant)
        scale, low = mx.where(low > 0, safe_divide(xl, l2), both), mx.minimum(low, 0)
        if self.absolute:
            error = self.measured(levels, scale, low)
        else:
            error = self.squares(scale, low, l1, l2, xl)
        better = (determinant > 0) & (error < self.error)
        self.scale = mx.where(better, scale, self.scale)
        self.low = mx.where(better, low, self.low)
        self.error = mx.where(better, error, self.error)
        mx.eval(self.scale, self.low, self.error)

    def measured(self, levels: mx.array, scale: mx.array, low: mx.array) -> mx.array:
        """The error, element by element."""
        gap = scale * levels + (low - self.x)
        return (self.w * (mx.abs(gap) if self.absolute else gap * gap)).sum(0)

    def squares(
        self, scale: mx.array, low: mx.array, l1: mx.array, l2: mx.array, xl: mx.array
    ) -> mx.array:
        """The squared error, from sums of w times 1, x, x x, l, l l and x l."""
        weight, wx, xx = self.sums
        return (
            xx
            - 2 * (scale * xl + low * wx)
            + scale * (scale * l2 + 2 * low * l1)
            + low * low * weight
        )


def fit_affine(
    x: mx.array, w: mx.array, top: int, steps: Sequence[float], absolute: bool = False
) -> tuple[mx.array, mx.array]:
    """Scale s and offset m >= 0, each (...), that make w |x + m - s l|^p small for l in 0..top.

    For every candidate number of steps over the range the levels are rounded and the weighted
    two-parameter least squares solved; the lowest error wins. p is 2, or 1 if `absolute`.
    """
    fit = AffineFit(x, w, top, absolute)
    for step in steps:
        inverse = safe_divide(mx.array(top + step), fit.largest - fit.low)
        fit.try_levels(nearest((x - fit.low) * inverse, top))
    return fit.scale, -fit.low
