"""What a hyper-connection does after its sublayer: new streams out of old ones; one launch."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel

STREAMS = 4
THREADS = 256

BODY = """
    uint d = threadgroup_position_in_grid.x * THREADS + thread_index_in_threadgroup;
    uint token = threadgroup_position_in_grid.y;
    if (d >= WIDTH) return;
    float y = float(out[token * WIDTH + d]), x[4];
    for (uint j = 0; j < 4; j++) x[j] = float(streams[(token * 4 + j) * WIDTH + d]);
    for (uint k = 0; k < 4; k++) {
        float v = post[token * 4 + k] * y;
        for (uint j = 0; j < 4; j++) v = fma(comb[token * 16 + 4 * j + k], x[j], v);
        merged[(token * 4 + k) * WIDTH + d] = static_cast<T>(v);
    }
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel; the streams' type is a template argument."""
    return Kernel("hyper_post", ["streams", "out", "post", "comb"], ["merged"], BODY)


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
    return streams.shape[1] == STREAMS and dispatch.active(streams, "hyper_post")


def plain(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """`after_sublayer` by MLX's own operations."""
    spread = post[..., None] * out[..., None, :].astype(mx.float32)
    kept = mx.swapaxes(comb, -1, -2) @ streams.astype(mx.float32)
    return (spread + kept).astype(streams.dtype)


def by_kernel(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """`after_sublayer` in one launch, of four streams, and of as many tokens as it can number."""
    count, _, width = streams.shape
    return kernel()(
        [streams, out, post, comb],
        [(streams.shape, streams.dtype)],
        groups=(-(-width // THREADS), count, 1),
        threads=THREADS,
        template=[("T", streams.dtype), ("WIDTH", width), ("THREADS", THREADS)],
    )[0]
