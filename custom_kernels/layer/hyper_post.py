"""What a hyper-connection does after its sublayer, in one launch: new streams out of old ones."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.dialect import Kernel

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


def hyper_post(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """new_k = post_k out + sum_j comb[j, k] stream_j.

    streams (N, 4, D), out (N, D), post float32 (N, 4), comb float32 (N, 4, 4) -> (N, 4, D).
    """
    count, _, width = streams.shape
    return kernel()(
        [streams, out, post, comb],
        [(streams.shape, streams.dtype)],
        groups=(-(-width // THREADS), count, 1),
        threads=THREADS,
        template=[("T", streams.dtype), ("WIDTH", width), ("THREADS", THREADS)],
    )[0]


def reference(streams: mx.array, out: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """The same by MLX's own operations, float32."""
    spread = post[..., None] * out[..., None, :].astype(mx.float32)
    return spread + mx.swapaxes(comb, -1, -2) @ streams.astype(mx.float32)
