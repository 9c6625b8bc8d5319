"""What a sublayer is given: streams collapsed by weights out of partial mixes, and normed; one launch.

Two threadgroups a token. One collapses and norms; the other makes the weights for afterwards, in one
SIMD-group. Sinkhorn's iterations are a chain that nothing else waits for: every lane keeps the 16
weights as they began and goes through factors of rows and columns, so that none waits for another.
"""

from functools import lru_cache
from typing import Any, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer import hyper_text
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES, STREAMS, Sizes, collapse, sinkhorn
from ds4mlx.custom_kernels.layer.plain import rms_norm
from ds4mlx.custom_kernels.words import LOAD8

# The inverse of a number near 1, to a unit in its last place; what is left of the error vanishes in
# the next iteration.
METAL = "inline float inverse(float v) { return 1.0f / v; }\n"
CUDA = "inline float inverse(float v) { return __fdividef(1.0f, v); }\n"

HEADER = """
inline float of_four(const thread float* v, uint i) {
  return i < 2 ? (i == 0 ? v[0] : v[1]) : (i == 2 ? v[2] : v[3]);
}
"""

FIRST = """
    bool collapses = threadgroup_position_in_grid.x == 0;
"""

# Lane 4 j + k begins with the weight from stream j to stream k; lanes 16.. repeat them.
WEIGHTS = """
    if (!collapses) {
        if (group > 0) return;
        uint e = lane & 15, four = lane & 3;
        float after = simd_shuffle(mix, 4 + four) * scale[1] + base[4 + four];
        float v = simd_shuffle(mix, 8 + e) * scale[2] + base[8 + e];
        float most = max(v, simd_shuffle_xor(v, 1));
        v = exp(v - max(most, simd_shuffle_xor(most, 2)));
        float sum = v + simd_shuffle_xor(v, 1);
        v = v / (sum + simd_shuffle_xor(sum, 2)) + eps;
        float k[16], row[4], column[4];
        #pragma unroll
        for (uint i = 0; i < 16; i++) k[i] = simd_shuffle(v, i);
        #pragma unroll
        for (uint i = 0; i < 4; i++) {
            row[i] = 1;
            column[i] = inverse(((k[i] + k[4 + i]) + (k[8 + i] + k[12 + i])) + eps);
        }
        for (uint n = 1; n < ITERATIONS; n++) {
            #pragma unroll
            for (uint i = 0; i < 4; i++) {
                float s = fma(k[4 * i], column[0], k[4 * i + 1] * column[1]);
                s += fma(k[4 * i + 2], column[2], k[4 * i + 3] * column[3]);
                row[i] *= inverse(fma(row[i], s, eps));
            }
            #pragma unroll
            for (uint i = 0; i < 4; i++) {
                float s = fma(k[i], row[0], k[4 + i] * row[1]);
                s += fma(k[8 + i], row[2], k[12 + i] * row[3]);
                column[i] *= inverse(fma(column[i], s, eps));
            }
        }
        if (lane < 16) comb[token * 16 + lane] = v * of_four(row, lane / 4) * of_four(column, four);
        if (lane < 4) post[token * 4 + lane] = 2.0f * sigmoid(after);
        return;
    }
"""


@lru_cache
def kernel() -> Kernel:
    """The kernel; the streams' type is a template argument."""
    inputs, outputs = ["streams", "partial", "base", "scale", "weight"], ["out", "post", "comb"]
    body = FIRST + hyper_text.LOADS + hyper_text.MIXES + WEIGHTS + hyper_text.COLLAPSE
    body += hyper_text.STORE
    header = LOAD8 + hyper_text.EIGHT + hyper_text.STORES + hyper_text.SIGMOID + HEADER
    return Kernel("hyper_in", inputs, outputs, body, header, metal=METAL, cuda=CUDA)


def hyper_in(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """A sublayer's input (B, D), normed, and float32 post (B, n) and comb (B, n, n) for what it gives.

    streams (B, n, D); partial float32 (B, P, (2 + n) n + 1), of the streams: see `hyper_out`; base
    ((2 + n) n,) and scale (3,) float32; norm (D,), the weight of the norm.
    """
    way = by_kernel if takes(streams) else plain
    return way(streams, partial, base, scale, norm, **sizes)


def takes(streams: mx.array) -> bool:
    """Whether the kernel collapses streams (B, n, D)."""
    return suits(streams) and dispatch.active(streams, "hyper_in")


def suits(streams: mx.array) -> bool:
    """Whether streams (B, n, D) are of sizes that are collapsed in a threadgroup each."""
    count, each, width = streams.shape
    sized = each == STREAMS and width % 8 == 0 and width <= hyper_text.MOST_WIDTH
    return sized and count <= dispatch.MOST_GROUPS


def plain(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`hyper_in` by MLX's own operations."""
    n, eps, norm_eps = streams.shape[1], sizes["eps"], sizes["norm_eps"]
    to_pre, to_post, to_comb = mx.split(mixes(streams, partial, norm_eps), [n, 2 * n], axis=-1)
    base_pre, base_post, base_comb = mx.split(base, [n, 2 * n])
    pre = mx.sigmoid(to_pre * scale[0] + base_pre) + eps
    post = 2 * mx.sigmoid(to_post * scale[1] + base_post)
    logits = (to_comb * scale[2] + base_comb).reshape(-1, n, n)
    x = rms_norm(collapse(streams, pre), norm, norm_eps)
    return x, post, sinkhorn(logits, sizes["iterations"], eps)


def mixes(streams: mx.array, partial: mx.array, eps: float) -> mx.array:
    """The mixes (B, rows) of normed streams (B, n, D), out of the partial ones of the streams."""
    total = partial.sum(axis=1)
    return total[:, :-1] * mx.rsqrt(total[:, -1:] / streams[0].size + eps)


def by_kernel(
    streams: mx.array,
    partial: mx.array,
    base: mx.array,
    scale: mx.array,
    norm: mx.array,
    **sizes: Unpack[Sizes],
) -> tuple[mx.array, mx.array, mx.array]:
    """`hyper_in` in one launch; see `suits`."""
    (count, _, width), slices = streams.shape, partial.shape[1]
    out, post, comb = kernel()(
        [streams, partial, base, scale, norm],
        [
            ((count, width), streams.dtype),
            ((count, STREAMS), mx.float32),
            ((count, STREAMS, STREAMS), mx.float32),
        ],
        groups=(2, count, 1),
        threads=32 * hyper_text.GROUPS,
        template=[
            *collapsing(streams.dtype, width, slices, MIXES, sizes["eps"], sizes["norm_eps"]),
            ("ITERATIONS", sizes["iterations"]),
        ],
    )
    return out, post, comb


def collapsing(
    dtype: mx.Dtype, width: int, slices: int, rows: int, eps: float, norm_eps: float
) -> list[tuple[str, Any]]:
    """Template arguments of a collapse of streams by sums over so many slices for so many mixes."""
    return [
        ("T", dtype),
        ("WIDTH", width),
        ("PASSES", -(-width // hyper_text.CHANNELS)),
        ("SLICES", slices),
        ("ROWS", rows),
        ("GROUPS", hyper_text.GROUPS),
        ("SUMMING", hyper_text.SUMMING),
        ("EPS", bits(eps)),
        ("NORM_EPS", bits(norm_eps)),
    ]
