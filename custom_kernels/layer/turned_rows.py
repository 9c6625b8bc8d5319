"""Rows of many tokens, normed, turned, Hadamard-transformed and laid out: one launch.

Queries, the window's rows, compressed rows, the indexer's queries and rows: a SIMD-group has one row, of
which lane l has the pairs of channels l, 32 + l, .. so that nothing passes through threadgroup memory.
"""

from functools import lru_cache
from typing import Any, Literal

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.plain import Angles, rms_norm, rotate
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.custom_kernels.layer.row_packing import INDEX, KV, PAIR

GROUPS = 8  # SIMD-groups of a threadgroup
PAIRS = 64  # channels in a pair of each lane: widths are multiples of it
MOST_WIDTH = 1024  # whose row fits into registers

Normed = Literal["", "unit", "weighted"]

HEADER = """
inline void load_pair(const device float* p, thread float* v) { v[0] = p[0]; v[1] = p[1]; }
inline void load_pair(const device bfloat16_t* p, thread float* v) {
  uint w = *(const device uint*)p;
  v[0] = as_type<float>(w << 16);
  v[1] = as_type<float>(w & 0xffff0000u);
}
inline void store_pair(device float* p, thread const float* v) { p[0] = v[0]; p[1] = v[1]; }
inline void store_pair(device bfloat16_t* p, thread const float* v) {
  *(device uint*)p = two_bf16(v[0], v[1]);
}
"""

# As of row_packing; channels 64 apart are in the same lane.
SPREAD = """
template <typename T, int N>
inline void spread_row(thread float* v, uint lane) {
  #pragma unroll
  for (int i = 0; i < N; i++) {
    float a = v[2 * i];
    v[2 * i] = a + v[2 * i + 1];
    v[2 * i + 1] = a - v[2 * i + 1];
  }
  #pragma unroll
  for (int h = 2; h < 64 * N; h *= 2) {
    float w[2 * N];
    bool rounds = h == 8 || h == 128 || 2 * h == 64 * N;
    #pragma unroll
    for (int e = 0; e < 2 * N; e++) {
      int i = e / 2;
      float other = h < 64 ? simd_shuffle_xor(v[e], ushort(h / 2 % 32)) : v[e ^ (h / 32)];
      bool upper = h < 64 ? (2 * lane & h) != 0 : (64 * i & h) != 0;
      w[e] = upper ? other - v[e] : v[e] + other;
      if (rounds) w[e] = as<T>(w[e]);
    }
    #pragma unroll
    for (int e = 0; e < 2 * N; e++) v[e] = w[e];
  }
  float scale = 1.0f / sqrt(float(64 * N));
  for (int e = 0; e < 2 * N; e++) v[e] = as<T>(v[e] * scale);
}
"""

# The values that index codes stand for.
ROUNDED = """
inline void round_pair(thread float* v) {
  float scale = scale_of(v, 16, as_type<float>(0x01400000u), 6.0f);
  for (int e = 0; e < 2; e++) {
    float x = v[e] / scale, y = fabs(x), size = y;
    size = y < 2.0f ? 0.5f * rint(2.0f * y) : y < 4.0f ? rint(y) : 2.0f * rint(0.5f * y);
    v[e] = (x < 0.0f ? -size : size) * scale;
  }
}
"""

BODY = """
    uint lane = thread_index_in_simdgroup, count = uint(x_shape[0]);
    uint row = threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup;
    if (row >= count) return;
    float v[2 * N];
    #pragma unroll
    for (uint i = 0; i < N; i++) load_pair(x + row * WIDTH + 64 * i + 2 * lane, v + 2 * i);
"""
NORM = """
    float sum = 0;
    #pragma unroll
    for (uint e = 0; e < 2 * N; e++) sum = fma(v[e], v[e], sum);
    float by = 1.0f / sqrt(simd_sum(sum) / float(WIDTH) + as_type<float>(EPS));
    #pragma unroll
    for (uint e = 0; e < 2 * N; e++) v[e] = as<T>(v[e] * by WEIGHT(e / 2 * 64 + 2 * lane + e % 2));
"""
TURN = """
    #pragma unroll
    for (uint i = 0; i < N; i++) {
        int t = int(32 * i + lane) - (WIDTH - ROPE) / 2;
        if (t < 0) continue;
        float c = cosines[row / EACH * (ROPE / 2) + t], s = sines[row / EACH * (ROPE / 2) + t];
        float a = v[2 * i];
        v[2 * i] = as<T>(a * c - v[2 * i + 1] * s);
        v[2 * i + 1] = as<T>(a * s + v[2 * i + 1] * c);
    }
"""
PUT = {
    "plain": "store_pair(out + row * WIDTH + 2 * at, v + 2 * i);",
    "rounded": "round_pair(v + 2 * i); store_pair(out + row * WIDTH + 2 * at, v + 2 * i);",
    "kv": "pack_kv<T>(v + 2 * i, out + row * WORDS, WIDTH, CODED, HEAD, at);",
    "index": "pack_index(v + 2 * i, out + row * WORDS, WIDTH, at);",
}


@lru_cache
def kernel(kind: str, normed: Normed, spread: bool) -> Kernel:
    """The kernel of rows of a kind."""
    put = f"uint at = 32 * i + lane; {PUT[kind]}"
    body = BODY + (NORM if normed else "") + TURN
    body += "    spread_row<T, N>(v, lane);\n" if spread else ""
    body += f"    #pragma unroll\n    for (uint i = 0; i < N; i++) {{ {put} }}\n"
    weight = "* float(norm[i])" if normed == "weighted" else ""
    header = f"#define WEIGHT(i) {weight}\n" + PAIR + HEADER + (SPREAD if spread else "")
    header += {"kv": KV, "index": INDEX, "rounded": ROUNDED}.get(kind, "")
    inputs = ["x", "cosines", "sines", *(["norm"] if normed == "weighted" else [])]
    return Kernel(name(kind, normed, spread), inputs, ["out"], body, header)


def name(kind: str, normed: Normed, spread: bool) -> str:
    """The name of a kernel."""
    return "_".join(
        ["turned", kind, *([normed] if normed else []), *(["spread"] if spread else [])]
    )


def takes(
    x: mx.array, angles: Angles, layout: RowLayout, *, normed: Normed = "", spread: bool = False
) -> bool:
    """Whether the kernel makes rows of a layout out of x (N, c) or (N, H, c)."""
    width, rope = x.shape[-1], 2 * angles[0].shape[-1]
    suits = width % PAIRS == 0 and width <= MOST_WIDTH and 0 < rope <= width
    suits = suits and layout.width == width and x.size < dispatch.MOST_ELEMENTS
    if layout.kind == "kv":
        suits = suits and layout.coded % 64 == 0 and layout.coded == width - rope
    suits = suits and (not spread or width & (width - 1) == 0)
    return suits and dispatch.active(x, name(layout.kind, normed, spread))


def by_kernel(
    x: mx.array,
    angles: Angles,
    layout: RowLayout,
    *,
    normed: Normed = "",
    norm: mx.array | None = None,
    eps: float = 0.0,
    spread: bool = False,
) -> mx.array:
    """Rows out of x (N, c) or (N, H, c), as a layout says: (N, elements) or (N, H, elements).

    normed: "unit" or "weighted", by `norm` (c,), where they are normed first. angles: of the N tokens,
    for the last channels. spread: Hadamard-transform them before they are laid out.
    """
    width, rope = x.shape[-1], 2 * angles[0].shape[-1]
    rows = x.size // width
    inputs = [x.reshape(rows, width), *angles, *([norm] if norm is not None else [])]
    numbers: dict[str, Any] = {
        "T": x.dtype,
        "N": width // PAIRS,
        "WIDTH": width,
        "ROPE": rope,
        "EACH": rows // len(x),
        "EPS": bits(eps),
        "GROUPS": GROUPS,
        "WORDS": layout.elements,
        "CODED": layout.coded,
        "HEAD": layout.head,
    }
    (out,) = kernel(layout.kind, normed, spread)(
        inputs,
        [((rows, layout.elements), layout.dtype)],
        groups=(-(-rows // GROUPS), 1, 1),
        threads=32 * GROUPS,
        template=list(numbers.items()),
    )
    return out.reshape(*x.shape[:-1], layout.elements)


def plain(
    x: mx.array,
    angles: Angles,
    form: Form,
    *,
    normed: Normed = "",
    norm: mx.array | None = None,
    eps: float = 0.0,
    spread: bool = False,
) -> mx.array:
    """`by_kernel` by MLX's own operations, for a form's layout."""
    rows = rotate(rms_norm(x, norm, eps) if normed else x, angles)
    return form.pack(mx.hadamard_transform(rows) if spread else rows)
