"""The grid points of IQ2_XXS nearest to given values, eight at a time, with signs that can be stored.

A group of eight keeps its signs in seven bits, so that an odd number of minus signs is impossible:
where the values have one, the sign that matters least is flipped. All 256 points are then compared.
POINTS does both in a kernel, with the grid in threadgroup memory; by MLX's own operations every distance
goes to memory and back.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ds4mlx.formats.iq import iq2_grid

# The grid in threadgroup memory, and the weighted squares of its points for every place of an eight.
POINTS = """
inline void stage(const device float* levels, const threadgroup float* w, uint places,
                  threadgroup float4* table, threadgroup float* sizes, uint own, uint threads) {
  for (uint point = own; point < 256; point += threads) {
    float level[8];
    load8(levels + 8 * point, level);
    for (uint place = 0; place < places; place++) {
      float size = 0;
      for (uint i = 0; i < 8; i++) size = fma(w[8 * place + i] * level[i], level[i], size);
      sizes[places * point + place] = size;
    }
    for (uint half = 0; half < 2; half++) {
      float4 q;
      q.x = level[4 * half]; q.y = level[4 * half + 1];
      q.z = level[4 * half + 2]; q.w = level[4 * half + 3];
      table[2 * point + half] = q;
    }
  }
}
// The code of what is stored of an eight v, and its values. `sizes`: those of its place.
inline uint nearest(const threadgroup float4* table, const threadgroup float* sizes, uint places,
                    const threadgroup float* w, float s, thread const float* v, thread float* values) {
  uint minus = 0, odd = 0, weakest = 0, best = 0;
  float least = INFINITY, u[8];
  for (uint i = 0; i < 8; i++) {
    uint below = v[i] < 0.0f;
    minus |= below << i;
    odd ^= below;
    float matters = w[i] * v[i] * v[i];
    if (matters < least) { least = matters; weakest = i; }
  }
  minus ^= odd << weakest;
  for (uint i = 0; i < 8; i++) u[i] = v[i] * (((minus >> i) & 1u) ? 2.0f : -2.0f) * w[i];
  least = INFINITY;
  for (uint point = 0; point < 256; point++) {
    float4 a = table[2 * point], b = table[2 * point + 1];
    float cost = s * sizes[places * point];
    cost = fma(a.x, u[0], cost); cost = fma(a.y, u[1], cost);
    cost = fma(a.z, u[2], cost); cost = fma(a.w, u[3], cost);
    cost = fma(b.x, u[4], cost); cost = fma(b.y, u[5], cost);
    cost = fma(b.z, u[6], cost); cost = fma(b.w, u[7], cost);
    if (cost < least) { least = cost; best = point; }
  }
  float4 a = table[2 * best], b = table[2 * best + 1];
  values[0] = a.x; values[1] = a.y; values[2] = a.z; values[3] = a.w;
  values[4] = b.x; values[5] = b.y; values[6] = b.z; values[7] = b.w;
  for (uint i = 0; i < 8; i++) values[i] *= ((minus >> i) & 1u) ? -s : s;
  return best | minus << 8;
}
inline void store8(device float* p, thread const float* v) {
  for (int i = 0; i < 2; i++) {
    float4 q;
    q.x = v[4 * i]; q.y = v[4 * i + 1]; q.z = v[4 * i + 2]; q.w = v[4 * i + 3];
    ((device float4*)p)[i] = q;
  }
}
"""


@lru_cache(maxsize=1)
def grid_levels() -> mx.array:
    """The grid in the unit of the search, (256, 8): levels 1, 3.125 and 5.375 of d (2 l + 1)."""
    return mx.array(np.array(iq2_grid()) / 8)


def nearest_points(x: mx.array, scale: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
    """What is stored of eights x float32 (..., P, 8), and the values that this stands for, as x.

    scale float32 (...), at least 0; w float32 (P, 8): how much each value matters. A code, uint32
    (..., P), is a point with a byte of signs above it. A point is nearest by the sum of w (x - s l)^2,
    of which only w s l^2 - 2 w x l tells points apart.
    """
    minus, v = even_signs(x, w)
    levels, points = grid_levels(), []
    for place, weights in enumerate(w):
        table = mx.concatenate([(levels * levels) @ weights[:, None], -2 * weights * levels], -1)
        sides = mx.concatenate([scale[..., None], v[..., place, :]], -1)
        points.append(mx.argmin(sides @ table.T, axis=-1))
    points = mx.stack(points, -1)
    values = scale[..., None, None] * levels[points]
    signs = (minus.astype(mx.uint32) << mx.arange(8, 16, dtype=mx.uint32)).sum(-1)
    return points | signs, mx.where(minus, -values, values)


def even_signs(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
    """(where a minus is stored, what the magnitudes then should be), for eights (..., 8)."""
    minus = x < 0
    odd = minus.astype(mx.int32).sum(-1, keepdims=True) % 2 == 1
    weakest = mx.arange(8) == mx.argmin(w * x * x, axis=-1, keepdims=True)
    minus = mx.not_equal(minus, weakest & odd)
    return minus, mx.where(minus, -x, x)


def signs_of(codes: mx.array) -> mx.array:
    """Where codes (...) have a minus, bool (..., 8)."""
    return (codes[..., None] >> mx.arange(8, 16, dtype=mx.uint32) & 1).astype(mx.bool_)
