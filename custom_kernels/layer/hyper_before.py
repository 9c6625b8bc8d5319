"""What a hyper-connection does before its sublayer, for any number of tokens: two launches.

The first makes partial mixes: a threadgroup has TOKENS tokens and a slice of the channels of all their
streams, and reads the weights of the slice once for all of them. A SIMD-group multiplies some of the
channels, of which a lane has 4 tokens by 6 mixes. The second is `hyper_in`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_in, hyper_pre
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS, Sizes
from ds4mlx.custom_kernels.words import LOAD8

TOKENS, GROUPS = 32, 8  # tokens and SIMD-groups of a threadgroup
AT_ONCE = 16 * GROUPS  # channels that are in threadgroup memory at a time
SLICE = 8 * AT_ONCE  # channels of a threadgroup

BODY = """
    threadgroup float words[(TOKENS + 24) * LD];
    threadgroup float* xs = words;
    threadgroup float* ws = words + TOKENS * LD;
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint at = thread_index_in_threadgroup, slice = threadgroup_position_in_grid.x;
    uint first = threadgroup_position_in_grid.y * TOKENS, count = uint(streams_shape[0]);
    uint begin = slice * SLICE, end = min(begin + uint(SLICE), uint(4 * WIDTH));
    uint t0 = lane / 4, m0 = lane % 4;
    float sums[4][6] = {{0}}, squares[4] = {0};
    // What comes next waits in registers: eight channels of two tokens, four of three mixes.
    float x[2][8];
    float4 w[3];
    FETCH(begin);
    for (uint k = begin; k < end; k += AT_ONCE) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint i = 0; i < 2; i++)
            for (uint e = 0; e < 8; e++) xs[(at / 16 + 16 * i) * LD + at % 16 * 8 + e] = x[i][e];
        #pragma unroll
        for (uint i = 0; i < 3; i++)
            *(threadgroup float4*)(ws + (at / 32 + 8 * i) * LD + at % 32 * 4) = w[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (k + AT_ONCE < end) FETCH(k + AT_ONCE);
        #pragma unroll 2
        for (uint s = 0; s < 4; s++) {
            uint c = 16 * sg + 4 * s;
            float4 f[6];
            #pragma unroll
            for (uint j = 0; j < 6; j++) f[j] = *(threadgroup float4*)(ws + (m0 + 4 * j) * LD + c);
            #pragma unroll
            for (uint i = 0; i < 4; i++) {
                const threadgroup float* own = xs + (t0 + 8 * i) * LD + c;
                float4 v = *(const threadgroup float4*)own;
                squares[i] = fma(own[m0], own[m0], squares[i]);
                #pragma unroll
                for (uint j = 0; j < 6; j++) {
                    float sum = fma(f[j].x, v.x, fma(f[j].y, v.y, sums[i][j]));
                    sums[i][j] = fma(f[j].z, v.z, fma(f[j].w, v.w, sum));
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float* parts = words + sg * (TOKENS * 25);
    #pragma unroll
    for (uint i = 0; i < 4; i++) {
        float square = squares[i] + simd_shuffle_xor(squares[i], 1);
        square += simd_shuffle_xor(square, 2);
        #pragma unroll
        for (uint j = 0; j < 6; j++) parts[(t0 + 8 * i) * 25 + m0 + 4 * j] = sums[i][j];
        if (m0 == 0) parts[(t0 + 8 * i) * 25 + 24] = square;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = at; e < TOKENS * 25; e += 32 * GROUPS) {
        float sum = 0;
        for (uint s = 0; s < GROUPS; s++) sum += words[s * (TOKENS * 25) + e];
        if (first + e / 25 < count) partial[((first + e / 25) * SLICES + slice) * 25 + e % 25] = sum;
    }
"""

# Rows lie so that lanes that read four channels of eight tokens, or of four mixes, meet other banks.
HEADER = """
#define LD (AT_ONCE + 4)
#define FETCH(k) \\
  for (uint i = 0; i < 2; i++) { \\
    uint token = min(first + at / 16 + 16 * i, count - 1), c = (k) + at % 16 * 8; \\
    if (c < end) load8(streams + token * (4 * WIDTH) + c, x[i]); \\
    else for (uint e = 0; e < 8; e++) x[i][e] = 0; \\
  } \\
  for (uint i = 0; i < 3; i++) { \\
    uint c = (k) + at % 32 * 4; \\
    w[i] = *(const device float4*)(fn + (at / 32 + 8 * i) * (4 * WIDTH) + min(c, end - 4)); \\
  }
"""


@lru_cache
def kernel() -> Kernel:
    """The first launch; the streams' type is a template argument."""
    return Kernel("hyper_mixes", ["streams", "fn"], ["partial"], BODY, LOAD8 + HEADER)


def before_sublayer(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    *,
    seen: Callable[[str, mx.array], mx.array] | None = None,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """A sublayer's input (N, D), normed, and float32 post (N, n) and comb (N, n, n) for what it gives.

    streams (N, n, D); fn ((2 + n) n, n D), base ((2 + n) n,), scale (3,), float32: a hyper-connection's
    weights; norm (D,): the weight of the norm. `seen` asks for the plain operations, and is given the
    weights `pre` (N, n) to go on from.
    """
    if seen is None and takes(streams):
        return by_kernel(streams, fn, base, scale, norm, **sizes)
    return hyper_pre.plain(streams, fn, base, scale, norm, seen=seen, **sizes)


def takes(streams: mx.array) -> bool:
    """Whether the launches take streams (N, n, D)."""
    suits = hyper_in.suits(streams) and streams.size < dispatch.MOST_ELEMENTS
    return suits and dispatch.active(streams, "hyper_mixes", "hyper_in")


def by_kernel(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`before_sublayer` in two launches; see `takes`."""
    return hyper_in.by_kernel(streams, mixes(streams, fn), base, scale, norm, **sizes)


def mixes(streams: mx.array, fn: mx.array) -> mx.array:
    """Partial mixes of streams (N, n, D), and sums of squares: float32 (N, P, (2 + n) n + 1)."""
    count, _, width = streams.shape
    slices = -(-STREAMS * width // SLICE)
    return kernel()(
        [streams, fn],
        [((count, slices, MIXES + 1), mx.float32)],
        groups=(slices, -(-count // TOKENS), 1),
        threads=32 * GROUPS,
        template=[
            ("T", streams.dtype),
            ("WIDTH", width),
            ("SLICES", slices),
            ("SLICE", SLICE),
            ("AT_ONCE", AT_ONCE),
            ("TOKENS", TOKENS),
            ("GROUPS", GROUPS),
        ],
    )[0]
