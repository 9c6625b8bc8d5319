"""Q2_K and Q4_K: sub-blocks with a small integer scale and offset, under two half-precision ones.

A scale and an offset are searched for every sub-block; then sub-block scales, offsets, and the two
block scales are solved in turn for the codes that they led to. The last step brings the error some
percent below that of ggml's quantiser, which has only the search.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ds4mlx.convert.fitting import fit_affine, fit_scale, halved, nearest, safe_divide

REFITS = 2


@dataclass(frozen=True)
class Shape:
    """What tells one K format from another."""

    sub: int  # weights a sub-block
    top: int  # largest code
    scale_top: int  # largest sub-block scale or offset
    plain_steps: tuple[float, ...]  # candidates without importance
    absolute: bool  # without importance, absolute errors weighted by |x|
    energy: float  # how much the block's mean square counts in the weights


STEPS = tuple(-0.9 + 0.15 * k for k in range(13))
Q2_K = Shape(16, 3, 15, tuple(-0.5 + 0.1 * k for k in range(16)), True, 1)
Q4_K = Shape(32, 15, 63, tuple(-1 + 0.1 * k for k in range(21)), False, 2)


class Levels(NamedTuple):
    """Quantised blocks: x = d s q - dmin m; d, dmin (N,), s, m (subs, N), q (sub, subs, N)."""

    d: mx.array
    dmin: mx.array
    s: mx.array
    m: mx.array
    q: mx.array

    def decoded(self) -> mx.array:
        """The values, (sub, subs, N)."""
        return self.d * self.s * self.q - self.dmin * self.m

    def rounded(self, x: mx.array, top: int) -> "Levels":
        """The best codes for these scales."""
        inverse = safe_divide(mx.array(1.0), self.d * self.s)
        return self._replace(q=nearest((x + self.dmin * self.m) * inverse, top))


def quantise_k(x: mx.array, importance: mx.array | None, shape: Shape) -> Levels:
    """Blocks x (N, 256), with the importance of every weight or None."""
    x, w = by_element(x, shape), by_element(weights(x, importance, shape), shape)
    if importance is None:
        s, m = fit_affine(x, w, shape.top, shape.plain_steps, shape.absolute)
        (d, s), (dmin, m) = by_largest(s, shape.scale_top), by_largest(m, shape.scale_top)
    else:
        s, m = fit_affine(x, w, shape.top, STEPS)
        d, s = fit_scale(s, w.sum(0), shape.scale_top)
        dmin, m = fit_scale(m, w.sum(0), shape.scale_top)
    levels = Levels(halved(d), halved(dmin), s, m, x).rounded(x, shape.top)
    for _ in range(REFITS):
        levels = refit(x, w, levels, shape)
        mx.eval(levels)
    return levels


def by_element(x: mx.array, shape: Shape) -> mx.array:
    """Blocks (N, 256) as (sub, subs, N)."""
    return mx.contiguous(x.reshape(len(x), -1, shape.sub).transpose(2, 1, 0))


def weights(x: mx.array, importance: mx.array | None, shape: Shape) -> mx.array:
    """How much an error in each weight counts, (N, 256)."""
    if importance is not None:
        return importance * mx.sqrt(shape.energy * (x * x).mean(-1, keepdims=True) + x * x)
    if shape.absolute:
        return mx.abs(x)
    subs = x.reshape(len(x), -1, shape.sub)
    return (mx.sqrt((subs * subs).mean(-1, keepdims=True)) + mx.abs(subs)).flatten(1)


def by_largest(x: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """(scale, levels) such that the largest of x (n, N) gets the top level."""
    scale = x.max(0) / top
    return scale, nearest(safe_divide(x, scale), top)


def refit(x: mx.array, w: mx.array, levels: Levels, shape: Shape) -> Levels:
    """Solve for sub-block scales, offsets, then d and dmin in turn; keep each where it is better."""
    levels = kept(x, w, levels, solve_s(x, w, levels, shape.scale_top).rounded(x, shape.top), 0)
    levels = kept(x, w, levels, solve_m(x, w, levels, shape.scale_top).rounded(x, shape.top), 0)
    return kept(x, w, levels, solve_d(x, w, levels).rounded(x, shape.top), (0, 1))


def solve_s(x: mx.array, w: mx.array, levels: Levels, top: int) -> Levels:
    """The best sub-block scales for the codes and everything else."""
    wq, offset = w * levels.q, levels.dmin * levels.m
    best = safe_divide((wq * (x + offset)).sum(0), levels.d * (wq * levels.q).sum(0))
    return levels._replace(s=nearest(best, top))


def solve_m(x: mx.array, w: mx.array, levels: Levels, top: int) -> Levels:
    """The best sub-block offsets for the codes and everything else."""
    gap = levels.d * levels.s * levels.q - x
    best = safe_divide((w * gap).sum(0), levels.dmin * w.sum(0))
    return levels._replace(m=nearest(best, top))


def solve_d(x: mx.array, w: mx.array, levels: Levels) -> Levels:
    """The best d and dmin for the codes and everything else."""
    a, b = levels.s * levels.q, mx.broadcast_to(-levels.m, x.shape)
    aa, ab, bb = _dot(w, a, a), _dot(w, a, b), _dot(w, b, b)
    xa, xb = _dot(w, x, a), _dot(w, x, b)
    determinant = aa * bb - ab * ab
    regular = determinant > 0
    d = mx.where(regular, safe_divide(xa * bb - xb * ab, determinant), safe_divide(xa, aa))
    dmin = mx.where(regular, safe_divide(aa * xb - ab * xa, determinant), 0.0)
    return levels._replace(d=halved(mx.maximum(d, 0)), dmin=halved(mx.maximum(dmin, 0)))


def kept(x: mx.array, w: mx.array, old: Levels, new: Levels, axes: int | tuple[int, ...]) -> Levels:
    """The one with the lower error, for every sub-block (axes 0) or block (axes 0 and 1)."""
    better = _loss(x, w, new, axes) < _loss(x, w, old, axes)
    return Levels(*(o if o is n else mx.where(better, n, o) for o, n in zip(old, new, strict=True)))


def _loss(x: mx.array, w: mx.array, levels: Levels, axes: int | tuple[int, ...]) -> mx.array:
    gap = levels.decoded() - x
    return (w * gap * gap).sum(axes)


def _dot(w: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return (w * a * b).sum((0, 1))


def q2_k_planes(levels: Levels) -> dict[str, mx.array]:
    """Planes of Q2_K blocks, (N, elements)."""
    s, m = levels.s.astype(mx.uint8), levels.m.astype(mx.uint8)
    return {"weight": _words(levels.q, 2), "scales": (s | m << 4).T, "d": _half_pairs(levels)}


def q4_k_planes(levels: Levels) -> dict[str, mx.array]:
    """Planes of Q4_K blocks, (N, elements); the six-bit scales packed as in GGUF."""
    s, m = levels.s.astype(mx.uint8), levels.m.astype(mx.uint8)
    early = [side[:4] | side[4:] >> 4 << 6 for side in (s, m)]
    octets = mx.concatenate([*early, s[4:] & 15 | (m[4:] & 15) << 4])
    scales = mx.contiguous(octets.T).view(mx.uint32)
    return {"weight": _words(levels.q, 4), "scales": scales, "d": _half_pairs(levels)}


def _words(codes: mx.array, bits: int) -> mx.array:
    """Codes (sub, subs, N) packed in words uint32 (N, 8 bits), first code in the lowest bits."""
    codes = codes.transpose(2, 1, 0).astype(mx.uint32).reshape(codes.shape[-1], -1, 32 // bits)
    return (codes << mx.arange(0, 32, bits, dtype=mx.uint32)).sum(-1)


def _half_pairs(levels: Levels) -> mx.array:
    return mx.stack([levels.d, levels.dmin], axis=-1).astype(mx.float16)
