"""A Q8_0 matrix, or several side by side, times a few rows of activations: one launch.

A SIMD-group makes ROWS values for up to TOKENS tokens, so that a matrix is read once for them.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.formats.base import Format, Planes

ROWS = 2  # rows of the matrix that a SIMD-group takes
GROUPS = 8  # SIMD-groups of a threadgroup
STAGED = 16384  # bytes of staged activations at a time
MOST = 8  # tokens from which on the tiled product is used

BODY = """
    threadgroup uint4 xs[TOKENS * (STAGED / 64 * 2 * WORDS)];
    threadgroup float scales[TOKENS * (STAGED / 32)];
    threadgroup float sums[TOKENS * (STAGED / 16)];
    uint lane = thread_index_in_simdgroup, at = thread_index_in_threadgroup;
    uint group = threadgroup_position_in_grid.z, token0 = threadgroup_position_in_grid.y * TOKENS;
    uint row0 = (threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup) * ROWS;
    uint first = group * WIDTH, count = uint(x_shape[STACKED]);

    Pack w[ROWS];
    float ys[ROWS][TOKENS];
    uint c = lane, last = COLUMNS / 64 - 1;
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        w[r] = load_pack(W, first + min(row0 + r, uint(WIDTH - 1)), min(c, last), COLUMNS);
        #pragma unroll
        for (uint t = 0; t < TOKENS; t++) ys[r][t] = 0;
    }
    for (uint base = 0; base < COLUMNS; base += STAGED) {
        uint columns = min(uint(STAGED), COLUMNS - base);
        if (base) threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint t = 0; t < TOKENS; t++) {
            uint token = group * count + min(token0 + t, count - 1);
            stage(x + token * COLUMNS + base, columns, xs + t * (STAGED / 64 * 2 * WORDS),
                  scales + t * (STAGED / 32), sums + t * (STAGED / 16), STAGED / 64, at, GROUPS * 32);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (; c < (base + columns) / 64; c += 32) {
            uint k = c - base / 64, next = min(c + 32, last);
            Pack w1[ROWS];
            #pragma unroll
            for (uint r = 0; r < ROWS; r++)
                w1[r] = load_pack(W, first + min(row0 + r, uint(WIDTH - 1)), next, COLUMNS);
            #pragma unroll
            for (uint h = 0; h < 2; h++) {
                #pragma unroll
                for (uint t = 0; t < TOKENS; t++) {
                    pair v[16];
                    fetch(xs + t * (STAGED / 64 * 2 * WORDS), STAGED / 64, k, h, v);
                    float scale = scales[t * (STAGED / 32) + h * (STAGED / 64) + k];
                    #pragma unroll
                    for (uint r = 0; r < ROWS; r++)
                        ys[r][t] += dot_group(w[r], h, v, scale, 0, 0, xs);
                }
            }
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) w[r] = w1[r];
        }
    }
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        #pragma unroll
        for (uint t = 0; t < TOKENS; t++) {
            float y = simd_sum(ys[r][t]);
            if (lane == 0 && row0 + r < WIDTH && token0 + t < count)
                out[(group * count + token0 + t) * WIDTH + row0 + r] = static_cast<T>(y);
        }
    }
"""


@lru_cache
def kernel(dtype: mx.Dtype) -> Kernel:
    """The kernel for activations of a type."""
    packing = PACKINGS["q8_0"]
    names = f"#define W {', '.join(packing.names('w'))}\n"
    text = staging.products(packing, dtype)
    name = f"q8_matvec_{staging.arithmetic(dtype)}"
    return Kernel(name, ["x", *packing.names("w")], ["out"], BODY, names + text)


def q8_matvec(planes: Planes, x: mx.array) -> mx.array:
    """x . W^T in x's type: planes of (out, in) or (G, out, in); x (N, in) or (G, N, in), N <= MOST."""
    *stack, count, columns = x.shape
    groups, width = (stack or [1])[0], planes["weight"].shape[-2]
    tokens = min(count, 2 if x.dtype == mx.float32 else 4)
    staged = staging.staged_columns(x.dtype, columns, STAGED // tokens)
    return kernel(x.dtype)(
        [x, *(planes[p] for p in PACKINGS["q8_0"].planes)],
        [((*stack, count, width), x.dtype)],
        groups=(-(-width // (ROWS * GROUPS)), -(-count // tokens), groups),
        threads=32 * GROUPS,
        template=[
            ("T", x.dtype),
            ("WIDTH", width),
            ("COLUMNS", columns),
            ("STACKED", len(stack)),
            ("TOKENS", tokens),
            ("ROWS", ROWS),
            ("GROUPS", GROUPS),
            ("STAGED", staged),
        ],
    )[0]


def reference(found: Format, planes: Planes, x: mx.array) -> mx.array:
    """The same by MLX's own operations; float32."""
    return x.astype(mx.float32) @ mx.swapaxes(found.decode(planes), -1, -2)
