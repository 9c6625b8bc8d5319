"""What a hyper-connection does before its sublayer; for a few tokens in one launch.

A threadgroup a token: the mixes (a product with all streams, normed), their sigmoids, Sinkhorn's
iterations by one SIMD-group, a lane for each of the 16 weights, and the collapse of the streams.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import LOAD8, Kernel

STREAMS = 4  # the kernel's lanes are laid out for so many
MIXES = (2 + STREAMS) * STREAMS
GROUPS = 16  # SIMD-groups of a threadgroup; of 32, an NVIDIA GPU's registers are too few

BODY = """
    threadgroup float parts[GROUPS * 25];
    threadgroup float mix[28];
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    uint at = thread_index_in_threadgroup, token = threadgroup_position_in_grid.x;
    const device T* row = streams + token * (4 * WIDTH);

    float sums[25] = {0};
    for (uint k = 8 * at; k < 4 * WIDTH; k += 8 * 32 * GROUPS) {
        float x[8];
        load8(row + k, x);
        for (uint i = 0; i < 8; i++) sums[24] = fma(x[i], x[i], sums[24]);
        #pragma unroll
        for (uint m = 0; m < 24; m++) {
            float w[8];
            load8(fn + m * (4 * WIDTH) + k, w);
            for (uint i = 0; i < 8; i++) sums[m] = fma(w[i], x[i], sums[m]);
        }
    }
    #pragma unroll
    for (uint m = 0; m < 25; m++) {
        float v = simd_sum(sums[m]);
        if (lane == 0) parts[m * GROUPS + sg] = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint m = sg; m < 25; m += GROUPS) {
        float v = simd_sum(lane < GROUPS ? parts[m * GROUPS + lane] : 0.0f);
        if (lane == 0) mix[m] = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float eps = as_type<float>(EPS);
    float norm = 1.0f / sqrt(mix[24] / float(4 * WIDTH) + as_type<float>(NORM_EPS));
    float pre[4];
    for (uint j = 0; j < 4; j++) pre[j] = sigmoid(mix[j] * norm * scale[0] + base[j]) + eps;
    for (uint d = at; d < WIDTH; d += 32 * GROUPS) {
        float y = 0;
        for (uint j = 0; j < 4; j++) y = fma(pre[j], float(row[j * WIDTH + d]), y);
        out[token * WIDTH + d] = static_cast<T>(y);
    }
    if (sg > 0) return;
    // Lane 4 j + k holds the weight from stream j to stream k; lanes 16.. repeat them.
    uint e = lane & 15;
    float v = mix[8 + e] * norm * scale[2] + base[8 + e];
    float most = max(v, simd_shuffle_xor(v, 1));
    most = max(most, simd_shuffle_xor(most, 2));
    v = exp(v - most);
    v = v / sum_of_row(v) + eps;
    v = v / (sum_of_column(v) + eps);
    for (uint i = 1; i < ITERATIONS; i++) {
        v = v / (sum_of_row(v) + eps);
        v = v / (sum_of_column(v) + eps);
    }
    if (lane < 16) comb[token * 16 + lane] = v;
    if (lane < 4) post[token * 4 + lane] = 2.0f * sigmoid(mix[4 + lane] * norm * scale[1] + base[4 + lane]);
"""

HEADER = """
inline float sigmoid(float v) { return 1.0f / (1.0f + exp(-v)); }
inline float sum_of_row(float v) {
  v += simd_shuffle_xor(v, 1);
  return v + simd_shuffle_xor(v, 2);
}
inline float sum_of_column(float v) {
  v += simd_shuffle_xor(v, 4);
  return v + simd_shuffle_xor(v, 8);
}
"""


class Sizes(TypedDict):
    """What is added to the weights and under the norm's root, and Sinkhorn's iterations."""

    iterations: int
    eps: float
    norm_eps: float


@lru_cache
def kernel() -> Kernel:
    """The kernel; the streams' type is a template argument."""
    inputs, outputs = ["streams", "fn", "base", "scale"], ["out", "post", "comb"]
    return Kernel("hyper_pre", inputs, outputs, BODY, LOAD8 + HEADER)


def before_sublayer(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    *,
    seen: Callable[[str, mx.array], mx.array] | None = None,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """streams (N, n, D) -> their collapse (N, D) in their type, post (N, n), comb (N, n, n) float32.

    fn ((2 + n) n, n D), base ((2 + n) n,), scale (3,), float32: a hyper-connection's weights.
    `seen` asks for the plain operations, and is given the weights `pre` (N, n) to go on from.
    """
    if seen is None and takes(streams):
        return by_kernel(streams, fn, base, scale, **sizes)
    return plain(streams, fn, base, scale, seen=seen, **sizes)


def takes(streams: mx.array) -> bool:
    """Whether the kernel takes streams (N, n, D)."""
    count, streams_each, width = streams.shape
    suits = count <= dispatch.FEW and streams_each == STREAMS and width % 8 == 0
    return suits and dispatch.active(streams, "hyper_pre")


def plain(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    *,
    seen: Callable[[str, mx.array], mx.array] | None = None,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`before_sublayer` by MLX's own operations."""
    n, eps = streams.shape[-2], sizes["eps"]
    mix = project(streams, fn, sizes["norm_eps"])
    to_pre, to_post, to_comb = mx.split(mix, [n, 2 * n], axis=-1)
    base_pre, base_post, base_comb = mx.split(base, [n, 2 * n])
    pre = mx.sigmoid(to_pre * scale[0] + base_pre) + eps
    if seen is not None:
        pre = seen("pre", pre)
    post = 2 * mx.sigmoid(to_post * scale[1] + base_post)
    logits = to_comb * scale[2] + base_comb
    comb = sinkhorn(logits.reshape(*logits.shape[:-1], n, n), sizes["iterations"], eps)
    return collapse(streams, pre), post, comb


def project(streams: mx.array, fn: mx.array, eps: float) -> mx.array:
    """fn . RMSNorm(flattened streams), float32: (..., n, D) -> (..., rows of fn)."""
    return mx.fast.rms_norm(streams.astype(mx.float32).flatten(-2), None, eps) @ fn.T


def collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """sum_j pre_j stream_j: (..., n, D), (..., n) -> (..., D) in the streams' type."""
    mixed = pre[..., None, :] @ streams.astype(mx.float32)
    return mixed.squeeze(-2).astype(streams.dtype)


def sinkhorn(logits: mx.array, iterations: int, eps: float) -> mx.array:
    """Nearly doubly stochastic (..., n, n): softmax of rows, then columns and rows in turn.

    Ends on columns, so each destination's weights sum to about 1.
    """
    comb = mx.softmax(logits, axis=-1, precise=True) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return comb


def by_kernel(
    streams: mx.array,
    fn: mx.array,
    base: mx.array,
    scale: mx.array,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`before_sublayer` in one launch, of four streams whose width is a multiple of 8."""
    count, _, width = streams.shape
    out, post, comb = kernel()(
        [streams, fn, base, scale],
        [
            ((count, width), streams.dtype),
            ((count, STREAMS), mx.float32),
            ((count, STREAMS, STREAMS), mx.float32),
        ],
        groups=(count, 1, 1),
        threads=32 * GROUPS,
        template=[
            ("T", streams.dtype),
            ("WIDTH", width),
            ("ITERATIONS", sizes["iterations"]),
            ("EPS", bits(sizes["eps"])),
            ("NORM_EPS", bits(sizes["norm_eps"])),
            ("GROUPS", GROUPS),
        ],
    )
    return out, post, comb
