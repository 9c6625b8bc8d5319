"""Q2_K and Q4_K: sub-blocks with a small integer scale and offset, under two half-precision ones.

After the candidates of the usual search, d and dmin are solved once more for the levels that they
led to, which lowers the error a little below the usual quantiser's.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.convert.fitting import fit_affine, fit_scale, halved, nearest, safe_divide
from ds4mlx.formats.bits import pack

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


STEPS = tuple(-0.9 + 0.05 * k for k in range(37))
Q2_K = Shape(16, 3, 15, tuple(-0.5 + 0.1 * k for k in range(16)), True, 1)
Q4_K = Shape(32, 15, 63, tuple(-1 + 0.1 * k for k in range(21)), False, 2)


@dataclass(frozen=True)
class Levels:
    """Quantised blocks: x = d s q - dmin m; d, dmin (N,), s, m (N, subs), q (N, subs, sub)."""

    d: mx.array
    dmin: mx.array
    s: mx.array
    m: mx.array
    q: mx.array


def quantise_k(x: mx.array, importance: mx.array | None, shape: Shape) -> Levels:
    """Blocks x (N, 256), with the importance of every weight or None."""
    subs = (len(x), 256 // shape.sub, shape.sub)
    w = weights(x, importance, shape).reshape(subs)
    x = x.reshape(subs)
    if importance is None:
        s, m = fit_affine(x, w, shape.top, shape.plain_steps, shape.absolute)
        (d, s), (dmin, m) = by_largest(s, shape.scale_top), by_largest(m, shape.scale_top)
    else:
        s, m = fit_affine(x, w, shape.top, STEPS)
        d, s = fit_scale(s, w.sum(-1), shape.scale_top)
        dmin, m = fit_scale(m, w.sum(-1), shape.scale_top)
    found = rounded(x, Levels(halved(d), halved(dmin), s, m, x), shape.top)
    for _ in range(REFITS):
        found = refit(x, w, found, shape.top)
    return found


def weights(x: mx.array, importance: mx.array | None, shape: Shape) -> mx.array:
    """How much an error in each weight counts, (N, 256)."""
    if importance is not None:
        return importance * mx.sqrt(shape.energy * (x * x).mean(-1, keepdims=True) + x * x)
    if shape.absolute:
        return mx.abs(x)
    subs = x.reshape(len(x), -1, shape.sub)
    return (mx.sqrt((subs * subs).mean(-1, keepdims=True)) + mx.abs(subs)).flatten(1)


def by_largest(x: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """(scale, levels) such that the largest of x (N, n) gets the top level."""
    scale = x.max(-1) / top
    return scale, nearest(safe_divide(x, scale[:, None]), top)


def rounded(x: mx.array, found: Levels, top: int) -> Levels:
    """The best codes q for given scales."""
    scale, offset = found.d[:, None] * found.s, found.dmin[:, None] * found.m
    q = nearest(safe_divide(x + offset[..., None], scale[..., None]), top)
    return Levels(found.d, found.dmin, found.s, found.m, q)


def decoded(found: Levels) -> mx.array:
    """The values, (N, subs, sub)."""
    scale, offset = found.d[:, None] * found.s, found.dmin[:, None] * found.m
    return scale[..., None] * found.q - offset[..., None]


def refit(x: mx.array, w: mx.array, found: Levels, top: int) -> Levels:
    """Solve d and dmin for the codes, round again, and keep that where it is better."""
    a = found.s[..., None] * found.q
    b = mx.broadcast_to(-found.m[..., None], a.shape)
    aa, ab, bb = _dot(w, a, a), _dot(w, a, b), _dot(w, b, b)
    xa, xb = _dot(w, x, a), _dot(w, x, b)
    determinant = aa * bb - ab * ab
    regular = determinant > 0
    d = mx.where(regular, safe_divide(xa * bb - xb * ab, determinant), safe_divide(xa, aa))
    dmin = mx.where(regular, safe_divide(aa * xb - ab * xa, determinant), 0.0)
    new = Levels(halved(d), halved(mx.maximum(dmin, 0)), found.s, found.m, found.q)
    new = rounded(x, new, top)
    gain = _loss(x, w, found) - _loss(x, w, new)
    better = (gain > 0) & (new.d > 0)
    return Levels(
        mx.where(better, new.d, found.d),
        mx.where(better, new.dmin, found.dmin),
        found.s,
        found.m,
        mx.where(better[:, None, None], new.q, found.q),
    )


def _dot(w: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return (w * a * b).sum((-1, -2))


def _loss(x: mx.array, w: mx.array, found: Levels) -> mx.array:
    gap = decoded(found) - x
    return _dot(w, gap, gap)


def q2_k_planes(found: Levels) -> dict[str, np.ndarray]:
    """Planes of Q2_K blocks, (N, elements)."""
    s, m = np.array(found.s).astype(np.uint8), np.array(found.m).astype(np.uint8)
    return {
        "weight": pack(np.array(found.q.flatten(1)).astype(np.uint8), 2),
        "scales": s | m << 4,
        "d": _half_pairs(found),
    }


def q4_k_planes(found: Levels) -> dict[str, np.ndarray]:
    """Planes of Q4_K blocks, (N, elements); the six-bit scales packed as in GGUF."""
    s, m = np.array(found.s).astype(np.uint8), np.array(found.m).astype(np.uint8)
    early = [side[:, :4] | side[:, 4:] >> 4 << 6 for side in (s, m)]
    late = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    octets = np.ascontiguousarray(np.concatenate([*early, late], axis=1))
    return {
        "weight": pack(np.array(found.q.flatten(1)).astype(np.uint8), 4),
        "scales": octets.view(np.uint32),
        "d": _half_pairs(found),
    }


def _half_pairs(found: Levels) -> np.ndarray:
    return np.array(mx.stack([found.d, found.dmin], axis=-1).astype(mx.float16))
