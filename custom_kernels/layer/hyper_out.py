"""What follows a sublayer: new streams, and at once their partial mixes for the next one; one launch.

A threadgroup has a slice of the channels of all streams and tokens. Its threads first ask for its part
of the matrix `fn`, which is read once; then a SIMD-group a token merges, a lane four channels of one
stream; and then every SIMD-group multiplies some of the matrix's rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_post, hyper_text
from ds4mlx.custom_kernels.layer.hyper_pre import STREAMS

GROUPS = 8  # SIMD-groups of a threadgroup
SLICE = 32  # channels of a threadgroup: four streams of them are four columns for each lane
MOST_ROWS = 32  # of fn

HEADER = """
inline void load4(const device float* p, thread float* v) {
  float4 q = *(const device float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
inline void load4(const device bfloat16_t* p, thread float* v) {
  uint2 q = *(const device uint2*)p;
  v[0] = as_type<float>(q.x << 16); v[1] = as_type<float>(q.x & 0xffff0000u);
  v[2] = as_type<float>(q.y << 16); v[3] = as_type<float>(q.y & 0xffff0000u);
}
"""

# The sums of several values over a SIMD-group, by fewer exchanges than one after another.
FOLD = """
// The sum of v[lane % N] of all lanes; N is a power of two.
template <int N> inline float folded(thread float* v, uint lane) {
  #pragma unroll
  for (uint d = 1; d < 32; d *= 2) {
    #pragma unroll
    for (uint i = 0; i < max(N / int(2 * d), 1); i++) {
      bool odd = lane & d;
      uint first = d < N ? 2 * i : i, second = d < N ? 2 * i + 1 : i;
      float given = odd ? v[first] : v[second];
      v[i] = (odd ? v[second] : v[first]) + simd_shuffle_xor(given, d);
    }
  }
  return v[0];
}
"""

_BEGIN = """
    threadgroup float values[TOKENS * 128];
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint slice = threadgroup_position_in_grid.x, slices = threadgroups_per_grid.x;
    uint stream = lane / 8, c = slice * 32 + lane % 8 * 4, tokens = uint(streams_shape[0]);
    float w[4 * EACH] = {0};
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint row = group * EACH + i;
        if (row < ROWS && c < WIDTH) load4(fn + (row * 4 + stream) * WIDTH + c, w + 4 * i);
    }
    for (uint b = group; b < tokens; b += GROUPS) {
        float v[4] = {0};
        if (c < WIDTH) {
"""

_READ = """
            load4(streams + (b * 4 + stream) * WIDTH + c, v);
"""

_MERGE = """
            float x[16], y[4];
            #pragma unroll
            for (uint j = 0; j < 4; j++) load4(streams + (b * 4 + j) * WIDTH + c, x + 4 * j);
            load4(out + b * WIDTH + c, y);
            ADD_SHARED
            float spread = post[b * 4 + stream];
            #pragma unroll
            for (uint t = 0; t < 4; t++) v[t] = spread * float(static_cast<T>(y[t]));
            #pragma unroll
            for (uint j = 0; j < 4; j++) {
                float kept = comb[b * 16 + 4 * j + stream];
                #pragma unroll
                for (uint t = 0; t < 4; t++) v[t] = fma(kept, x[4 * j + t], v[t]);
            }
            #pragma unroll
            for (uint t = 0; t < 4; t++) v[t] = float(static_cast<T>(v[t]));
            store4(merged + (b * 4 + stream) * WIDTH + c, v);
"""

_ADD_SHARED = """
            float other[4];
            load4(shared_out + b * WIDTH + c, other);
            #pragma unroll
            for (uint t = 0; t < 4; t++) y[t] += float(static_cast<T>(other[t]));
"""

_END = """
        }
        float square = 0;
        #pragma unroll
        for (uint t = 0; t < 4; t++) {
            values[b * 128 + 32 * t + lane] = v[t];
            square = fma(v[t], v[t], square);
        }
        square = simd_sum(square);
        if (lane == 0) partial[(b * slices + slice) * (ROWS + 1) + ROWS] = square;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sums[EACH * TOKENS] = {0};
    #pragma unroll
    for (uint b = 0; b < TOKENS; b++) {
        if (b >= tokens) break;
        float x[4];
        #pragma unroll
        for (uint t = 0; t < 4; t++) x[t] = values[b * 128 + 32 * t + lane];
        #pragma unroll
        for (uint i = 0; i < EACH; i++)
            #pragma unroll
            for (uint t = 0; t < 4; t++)
                sums[i * TOKENS + b] = fma(w[4 * i + t], x[t], sums[i * TOKENS + b]);
    }
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        uint row = group * EACH + i;
        float sum = folded<TOKENS>(sums + i * TOKENS, lane);
        if (row < ROWS && lane < tokens)
            partial[(lane * slices + slice) * (ROWS + 1) + row] = sum;
    }
"""


@lru_cache
def kernel(outs: int) -> Kernel:
    """The kernel that merges what a sublayer gave in so many arrays; of none, it reads streams."""
    header = hyper_text.STORES + HEADER + FOLD
    if not outs:
        return Kernel("hyper_mix", ["streams", "fn"], ["partial"], _BEGIN + _READ + _END, header)
    shared = ["shared_out"] if outs == 2 else []
    inputs = ["streams", "post", "comb", "fn", "out", *shared]
    merge = _MERGE.replace("ADD_SHARED", _ADD_SHARED if shared else "")
    name = "hyper_out_two" if shared else "hyper_out"
    return Kernel(name, inputs, ["partial", "merged"], _BEGIN + merge + _END, header)


def hyper_out(
    streams: mx.array, outs: Sequence[mx.array], post: mx.array, comb: mx.array, fn: mx.array
) -> tuple[mx.array, mx.array]:
    """New streams (B, n, D) in the streams' type T, and their partial mixes float32 (B, P, rows + 1).

    new_k = post_k y + sum_j comb[j, k] stream_j; post float32 (B, n), comb float32 (B, n, n). outs:
    float32 (B, D), one, which is rounded to T as y, or two, of which the second is rounded first, and
    then the sum. fn float32 (rows, n D) is the matrix of the hyper-connection that comes next, or of
    the head; the partial mixes are sums over slices of channels of fn . new, and of new's squares.
    """
    if takes(streams, fn, "hyper_out"):
        return by_kernel(streams, outs, post, comb, fn)
    return plain(streams, outs, post, comb, fn)


def hyper_mix(streams: mx.array, fn: mx.array) -> mx.array:
    """Partial mixes float32 (B, P, rows + 1) of streams (B, n, D) before any sublayer."""
    return mix_by_kernel(streams, fn) if takes(streams, fn, "hyper_mix") else mix_plain(streams, fn)


def takes(streams: mx.array, fn: mx.array, kernel: str) -> bool:
    """Whether the kernel multiplies streams (B, n, D) by fn."""
    count, each, width = streams.shape
    suits = each == STREAMS and width % 8 == 0 and len(fn) <= MOST_ROWS and count <= dispatch.FEW
    return suits and dispatch.active(streams, kernel)


def plain(
    streams: mx.array, outs: Sequence[mx.array], post: mx.array, comb: mx.array, fn: mx.array
) -> tuple[mx.array, mx.array]:
    """`hyper_out` by MLX's own operations."""
    dtype, out = streams.dtype, outs[0]
    if len(outs) == 2:
        out = out + outs[1].astype(dtype).astype(mx.float32)
    new = hyper_post.plain(streams, out.astype(dtype), post, comb)
    return new, mix_plain(new, fn)


def mix_plain(streams: mx.array, fn: mx.array) -> mx.array:
    """`hyper_mix` by MLX's own operations, in one slice."""
    x = streams.astype(mx.float32).flatten(1)
    return mx.concatenate([x @ fn.T, x.square().sum(-1, keepdims=True)], axis=-1)[:, None]


def by_kernel(
    streams: mx.array, outs: Sequence[mx.array], post: mx.array, comb: mx.array, fn: mx.array
) -> tuple[mx.array, mx.array]:
    """`hyper_out` in one launch; see `takes`."""
    merged = streams.shape, streams.dtype
    partial, new = _launch(len(outs), [streams, post, comb, fn, *outs], fn, [merged])
    return new, partial


def mix_by_kernel(streams: mx.array, fn: mx.array) -> mx.array:
    """`hyper_mix` in one launch; see `takes`."""
    return _launch(0, [streams, fn], fn, [])[0]


def _launch(outs: int, inputs: list[mx.array], fn: mx.array, more: list[Any]) -> list[mx.array]:
    """The partial mixes of streams, the first of the inputs, and `more` outputs."""
    count, _, width = inputs[0].shape
    slices, rows = -(-width // SLICE), len(fn)
    return kernel(outs)(
        inputs,
        [((count, slices, rows + 1), mx.float32), *more],
        groups=(slices, 1, 1),
        threads=32 * GROUPS,
        template=[
            ("T", inputs[0].dtype),
            ("WIDTH", width),
            ("TOKENS", dispatch.made_up(count)),
            ("ROWS", rows),
            ("EACH", -(-rows // GROUPS)),
            ("GROUPS", GROUPS),
        ],
    )
