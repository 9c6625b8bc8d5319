"""Rows in Q2_K or Q4_K while they are rounded with error feedback.

Sub-block scales and offsets stay those of the search by importance. Codes are rounded column by
column; the scales of whole blocks, d and dmin, are refitted.
"""

import mlx.core as mx

from ds4mlx.convert.feedback import BLOCK, GROUP, Moment, fused
from ds4mlx.convert.fitting import halved, safe_divide
from ds4mlx.convert.quantise_k import Levels, Shape, by_element, quantise_k

PER_BLOCK = BLOCK // GROUP


class KRounding:
    """A `Rounding`. For every block, x = d s q - dmin m: d, dmin (R, 1); s, m (R, 256); q by groups."""

    def __init__(self, w: mx.array, moment: Moment, shape: Shape):
        self.shape, rows = shape, len(w)
        weights = mx.broadcast_to(mx.diag(moment.h), w.shape).reshape(-1, BLOCK)
        self.levels = quantise_k(w.reshape(-1, BLOCK), weights, shape)
        s, m = (
            mx.repeat(side.T.reshape(rows, -1, BLOCK // shape.sub), shape.sub, -1)
            for side in (self.levels.s, self.levels.m)
        )
        d, dmin = (side.reshape(rows, -1) for side in (self.levels.d, self.levels.dmin))
        blocks = range(d.shape[1])
        self.d = [(d[:, b, None], dmin[:, b, None]) for b in blocks]
        self.bases = [(s[:, b], m[:, b]) for b in blocks]
        self.codes = [mx.zeros(1)] * (len(blocks) * PER_BLOCK)
        self._round, self._change = fused(rounded), fused(changed)

    def _steps(self, k: int) -> tuple[mx.array, mx.array]:
        """What a code of each column of a group counts, and what is taken off, (R, 32)."""
        block, at = k // PER_BLOCK, slice(k % PER_BLOCK * GROUP, (k % PER_BLOCK + 1) * GROUP)
        (d, dmin), (s, m) = self.d[block], self.bases[block]
        return d * s[:, at], dmin * m[:, at]

    def round_group(self, k: int, x: mx.array, root: mx.array, inverse: mx.array) -> mx.array:
        top = mx.array(self.shape.top)
        self.codes[k], error = self._round(x, *self._steps(k), root, inverse, top)
        mx.async_eval(error, self.codes[k])
        return error

    def change_group(self, k: int, g: mx.array, h: mx.array) -> mx.array:
        old, (step, offset) = self.codes[k], self._steps(k)
        self.codes[k] = self._change(old, g, step, offset, h, mx.array(self.shape.top))
        mx.async_eval(self.codes[k])
        return step * (self.codes[k] - old)

    def refit(self, block: int, g: mx.array, h: mx.array) -> None:
        codes = mx.concatenate(self.codes[block * PER_BLOCK : (block + 1) * PER_BLOCK], -1)
        s, m = self.bases[block]
        self.d[block] = refitted(self.d[block], s * codes, -m, g, h)

    def values(self, block: int) -> mx.array:
        codes = mx.concatenate(self.codes[block * PER_BLOCK : (block + 1) * PER_BLOCK], -1)
        (d, dmin), (s, m) = self.d[block], self.bases[block]
        return d * (s * codes) - dmin * m

    def stored(self) -> Levels:
        """The blocks of all rows."""
        q = mx.concatenate(self.codes, -1).reshape(-1, BLOCK)
        d, dmin = (mx.concatenate(list(each), -1).reshape(-1) for each in zip(*self.d, strict=True))
        return self.levels._replace(d=d, dmin=dmin, q=by_element(q, self.shape))


def rounded(
    x: mx.array, step: mx.array, offset: mx.array, root: mx.array, inverse: mx.array, top: mx.array
) -> tuple[mx.array, mx.array]:
    """Codes of x (R, 32), each column making good the errors before it, and errors times the root."""
    codes, errors = [], []
    share = safe_divide(mx.array(1.0), step)
    for i in range(GROUP):
        at = slice(i, i + 1)
        codes.append(mx.clip(mx.round((x[:, at] + offset[:, at]) * share[:, at]), 0, top))
        gap = x[:, at] + offset[:, at] - step[:, at] * codes[-1]
        errors.append(gap * root[i, i])
        x = x - errors[-1] * inverse[at]
    return mx.concatenate(codes, -1), mx.concatenate(errors, -1)


def changed(
    q: mx.array, g: mx.array, step: mx.array, offset: mx.array, h: mx.array, top: mx.array
) -> mx.array:
    """Codes (R, 32) after each column has taken its best value, one after another."""
    codes, share = [], safe_divide(mx.array(1.0), step)
    for i in range(GROUP):
        at = slice(i, i + 1)
        wanted = mx.round(g[:, at] / h[i, i] * share[:, at])
        codes.append(mx.clip(q[:, at] + wanted, 0, top))
        g = g - step[:, at] * (codes[-1] - q[:, at]) * h[at]
    return mx.concatenate(codes, -1)


def refitted(
    scales: tuple[mx.array, mx.array], a: mx.array, b: mx.array, g: mx.array, h: mx.array
) -> tuple[mx.array, mx.array]:
    """d and dmin (R, 1) of values d a + dmin b (R, 256) in half precision, where they are better."""
    ah, bh = a @ h, b @ h
    aa, ab, bb, ga, gb = (
        (one * other).sum(-1, keepdims=True)
        for one, other in ((ah, a), (ah, b), (bh, b), (g, a), (g, b))
    )
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-6 * aa * bb
    more = mx.where(regular, safe_divide(ga * bb - gb * ab, determinant), safe_divide(ga, aa))
    less = mx.where(regular, safe_divide(aa * gb - ab * ga, determinant), 0.0)
    new = [halved(mx.maximum(s + c, 0)) for s, c in zip(scales, (more, less), strict=True)]
    x, y = (n - s for n, s in zip(new, scales, strict=True))
    better = x * x * aa + 2 * x * y * ab + y * y * bb < 2 * (x * ga + y * gb)
    d, dmin = (mx.where(better, n, s) for n, s in zip(new, scales, strict=True))
    return d, dmin
