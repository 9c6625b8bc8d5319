"""What a hyper-connection does after its sublayer: new streams out of old ones; one launch."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_text
from ds4mlx.custom_kernels.words import LOAD8

STREAMS = 4
THREADS = 256  # each has eight channels

BODY = """
    uint d = 8 * (threadgroup_position_in_grid.x * THREADS + thread_index_in_threadgroup);
    uint token = threadgroup_position_in_grid.y;
    if (d >= WIDTH) return;
    float y[8], x[4][8];
    load8(out + token * WIDTH + d, y);
    #pragma unroll
    for (uint j = 0; j < 4; j++) load8(streams + (token * 4 + j) * WIDTH + d, x[j]);
    #pragma unroll
    for (uint k = 0; k < 4; k++) {
        float v[8];
        for (uint e = 0; e < 8; e++) v[e] = post[token * 4 + k] * y[e];
        for (uint j = 0; j < 4; j++) {
            float w = comb[token * 16 + 4 * j + k];
            for (uint e = 0; e < 8; e++) v[e] = fma(w, x[j][e], v[e]);
        }
        device T* to = merged + (token * 4 + k) * WIDTH + d;
        store4(to, v);
        store4(to + 4, v + 4);
    }
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel; the streams' type is a template argument."""
    header = LOAD8 + hyper_text.STORES
    return Kernel("hyper_post", ["streams", "out", "post", "comb"], ["merged"], BODY, header)


def after_sublayer(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """new_k = post_k out + sum_j comb[j, k] stream_j, computed in float32.

    streams (N, n, D), out (N, D), post float32 (N, n), comb float32 (N, n, n) -> (N, n, D) in the
    streams' type. comb goes from stream j to stream k.
    """
    if not takes(streams):
        return plain(streams, out, post, comb)
    most = dispatch.most_tokens(streams.shape[1] * streams.shape[2])
    return dispatch.in_pieces(by_kernel, most, streams, out, post, comb)


def takes(streams: mx.array) -> bool:
    """Whether the kernel makes new streams of (N, n, D)."""
    suits = streams.shape[1] == STREAMS and streams.shape[2] % 8 == 0
    return suits and dispatch.active(streams, "hyper_post")


def plain(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """`after_sublayer` by MLX's own operations."""
    spread = post[..., None] * out[..., None, :].astype(mx.float32)
    kept = mx.swapaxes(comb, -1, -2) @ streams.astype(mx.float32)
    return (spread + kept).astype(streams.dtype)


def by_kernel(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """`after_sublayer` in one launch, of as many tokens as it can number; see `takes`."""
    count, _, width = streams.shape
    return kernel()(
        [streams, out, post, comb],
        [(streams.shape, streams.dtype)],
        groups=(-(-width // (8 * THREADS)), count, 1),
        threads=THREADS,
        template=[("T", streams.dtype), ("WIDTH", width), ("THREADS", THREADS)],
    )[0]
