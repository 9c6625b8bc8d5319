"""Activations in threadgroup memory, as the products want them.

Columns are taken in groups of 32, each scaled by a power of two so that its largest value fits half
precision, whatever the range of the activations; two groups make the chunk a lane works on. A group
lies as 16 pairs of columns that the format's codes come in. HALF multiplies half2 by half2 and
sums a group in float; FLOAT, for float32 activations, does all in float. BYTES rounds a group to 255
steps and multiplies four columns at a time in integers: faster where arithmetic is the limit, less
exact, and off unless asked for.
"""

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import Packing
from ds4mlx.custom_kernels.words import LOAD8

CHUNK = 64  # columns a lane takes at a time
STEP = 32 * CHUNK  # columns a SIMD-group takes at a time

_HALF = """
typedef half2 pair;
#define WORDS 4
inline pair make_pair(float a, float b) { return pair2(a, b); }
inline pair mad(half2 w, pair x, pair sum) { return mad2(w, x, sum); }
inline float total(pair v) { return low(v) + high(v); }
inline uint4 words(const thread pair* p) {
  uint4 v;
  v.x = as_uint(p[0]); v.y = as_uint(p[1]); v.z = as_uint(p[2]); v.w = as_uint(p[3]);
  return v;
}
inline void pairs(uint4 v, thread pair* p) {
  p[0] = as_half2(v.x); p[1] = as_half2(v.y); p[2] = as_half2(v.z); p[3] = as_half2(v.w);
}
"""

_FLOAT = """
struct pair { float x, y; };
#define WORDS 8
inline pair make_pair(float a, float b) { pair p; p.x = a; p.y = b; return p; }
inline pair mad(half2 w, pair x, pair sum) {
  sum.x = fma(low(w), x.x, sum.x);
  sum.y = fma(high(w), x.y, sum.y);
  return sum;
}
inline float total(pair v) { return v.x + v.y; }
inline uint4 words(const thread pair* p) {
  uint4 v;
  v.x = as_type<uint>(p[0].x); v.y = as_type<uint>(p[0].y);
  v.z = as_type<uint>(p[1].x); v.w = as_type<uint>(p[1].y);
  return v;
}
inline void pairs(uint4 v, thread pair* p) {
  p[0].x = as_type<float>(v.x); p[0].y = as_type<float>(v.y);
  p[1].x = as_type<float>(v.z); p[1].y = as_type<float>(v.w);
}
"""

# What both ways of staging share: two neighbouring lanes stage a group, 16 columns each.
_SUM = """
inline float sum16(const thread float* v) {
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += v[i];
  return sum;
}
"""
_GROUP = """
// 16 columns, and the bits of the largest magnitude in the group: those of a NaN are above all others.
template <typename T>
inline uint load_half(const device T* x, thread float* v) {
  load8(x, v);
  load8(x + 8, v + 8);
  uint most = 0;
  for (int i = 0; i < 16; i++) most = max(most, as_type<uint>(v[i]) & 0x7fffffffu);
  return max(most, simd_shuffle_xor(most, 1));
}
template <typename T>
inline void stage(const device T* x, uint columns, threadgroup uint4* xs, threadgroup float* scales,
                  threadgroup float* sums, uint chunks, uint at, uint threads) {
  // SIMD-groups go round as a whole, because lanes ask each other for the largest.
  for (uint i0 = at & ~31u; i0 < columns / 16; i0 += threads) {
    uint i = i0 + (at & 31u);
    float v[16];
    uint most = load_half(x + 16 * min(i, columns / 16 - 1), v);
    uint c = i / 4, h = i / 2 % 2, s = i % 2;
    if (i < columns / 16) stage_half(v, most, xs, scales, sums, chunks, c, h, s);
  }
}
"""

# FIRST and SECOND (i) give the columns of pair i; LARGEST is what a group is scaled to.
_STAGE = """
#define QUADS (16 / WORDS)
inline void stage_half(thread float* v, uint most, threadgroup uint4* xs, threadgroup float* scales,
                       threadgroup float* sums, uint chunks, uint c, uint h, uint s) {
  uint e = min(max(most >> 23, 30u), 250u);
  float down = as_type<float>((254u - e) << 23) * (0.5f * LARGEST);
  if (s == 0) scales[h * chunks + c] = as_type<float>(e << 23) * (2.0f / LARGEST);
  sums[(2 * h + s) * chunks + c] = sum16(v);
  for (int q = 0; q < WORDS / 2; q++) {
    pair p[QUADS];
    for (int i = 0; i < QUADS; i++)
      p[i] = make_pair(v[FIRST(QUADS * q + i)] * down, v[SECOND(QUADS * q + i)] * down);
    xs[(WORDS * h + WORDS / 2 * s + q) * chunks + c] = words(p);
  }
}
inline void fetch(const threadgroup uint4* xs, uint chunks, uint c, uint h, thread pair* x) {
  for (int q = 0; q < WORDS; q++) pairs(xs[(WORDS * h + q) * chunks + c], x + QUADS * q);
}
"""

_BYTES = """
typedef uint pair;
#define WORDS 2
// Columns AT(i) + 0, 1, 2, 3 times APART as signed bytes of a word.
inline uint quad(const thread float* v) {
  uint w = 0;
  for (int j = 0; j < 4; j++) w |= (uint(int(v[j * APART])) & 255u) << (8 * j);
  return w;
}
inline void stage_half(thread float* v, uint bits, threadgroup uint4* xs, threadgroup float* scales,
                       threadgroup float* sums, uint chunks, uint c, uint h, uint s) {
  float most = as_type<float>(bits);
  float down = most > 1e-30f ? 127.0f / most : 0.0f, scale = most / 127.0f;
  // Of a group with a NaN or an infinity all steps are 0, and its scale makes the products NaN.
  for (int i = 0; i < 16; i++) v[i] = down > 0 ? rint(v[i] * down) : 0.0f;
  if (s == 0) scales[h * chunks + c] = scale;
  float sum = sum16(v);
  sums[(2 * h + s) * chunks + c] = sum * scale;
  uint4 w;
  w.x = quad(v + AT(0));
  w.y = quad(v + AT(1));
  w.z = quad(v + AT(2));
  w.w = quad(v + AT(3));
  xs[(2 * h + s) * chunks + c] = w;
}
inline void fetch(const threadgroup uint4* xs, uint chunks, uint c, uint h, thread pair* x) {
  for (int q = 0; q < 2; q++) {
    uint4 w = xs[(2 * h + q) * chunks + c];
    x[4 * q] = w.x; x[4 * q + 1] = w.y; x[4 * q + 2] = w.z; x[4 * q + 3] = w.w;
  }
}
"""


def products(packing: Packing, dtype: mx.Dtype, eight: bool = False) -> str:
    """Text that stages activations of a type, or as bytes, and multiplies a format's codes with them."""
    if eight:
        return _byte_staging(packing.apart) + packing.loading + packing.byte_dot
    return _staging(dtype, packing.pairing, packing.largest) + packing.loading + packing.dot


def _byte_staging(apart: int) -> str:
    """Text that stages activations as bytes, four columns `apart` of each other to a word."""
    at = f"((i) / {apart} * {4 * apart} + (i) % {apart})"
    return f"#define APART {apart}\n#define AT(i) {at}\n" + LOAD8 + _SUM + _BYTES + _GROUP


def as_bytes(x: mx.array) -> mx.array:
    """What BYTES makes of activations (..., n), n a multiple of 32; float32."""
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 32)
    most = mx.abs(groups).max(-1, keepdims=True)
    down = mx.where(most > 1e-30, 127 / mx.maximum(most, 1e-30), 0)
    return (mx.round(groups * down) * (most / 127)).reshape(x.shape)


def _staging(dtype: mx.Dtype, pairing: str, largest: int) -> str:
    """Text that stages activations of a type for codes that come in pairs `pairing` apart.

    pairing: "4", "8" or "16": columns i and i + half of it, within each so many, are a pair.
    """
    half = int(pairing) // 2
    definitions = (
        f"#define FIRST(i) ((i) / {half} * {2 * half} + (i) % {half})\n"
        f"#define SECOND(i) (FIRST(i) + {half})\n#define LARGEST {largest}.0f\n"
    )
    return (_FLOAT if dtype == mx.float32 else _HALF) + definitions + LOAD8 + _SUM + _STAGE + _GROUP


def arithmetic(dtype: mx.Dtype, eight: bool = False) -> str:
    """What a kernel computes in, as part of its name."""
    return "bytes" if eight else "f32" if dtype == mx.float32 else "half"


def staged_columns(dtype: mx.Dtype, columns: int, most: int) -> int:
    """Columns staged at a time: all of them, or whole steps up to `most` bytes of half values."""
    room = most // (4 if dtype == mx.float32 else 2)
    return min(columns, max(STEP, room // STEP * STEP))
