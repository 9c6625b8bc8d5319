"""A Q8_0 matrix, or several side by side, times many rows of activations: a tiled product."""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import lut
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import matmul, tiles
from ds4mlx.formats import FORMATS, Planes

BODY = (
    matmul.START
    + """
    uint matrix = threadgroup_position_in_grid.z, column0 = threadgroup_position_in_grid.x * WIDE;
    uint count = uint(x_shape[STACKED]), row0 = threadgroup_position_in_grid.y * TALL;
    uint rows = min(uint(TALL), count - row0);
"""
    + matmul.LOOP
    + """
    #pragma unroll
    for (uint i = 0; i < 2; i++) {
        #pragma unroll
        for (uint j = 0; j < across; j++) {
            store(c[i][j], own, lane);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            uint r = down + TALL / 2 * i + lane / 2;
            uint column = column0 + right + 16 * j + lane % 2 * 8;
            if (r < rows) {
                for (uint n = 0; n < 8 && column + n < WIDTH; n++)
                    out[size_t(matrix * count + row0 + r) * WIDTH + column + n] =
                        static_cast<T>(own[lane / 2 * 16 + lane % 2 * 8 + n]);
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
"""
)

DEFINED = """
#define A_ROW(i) (matrix * count + row0 + (i))
#define GROUP(b, g) load_group(W, matrix * WIDTH + min(column0 + (b), uint(WIDTH - 1)), g, COLUMNS)
"""


@lru_cache
def kernel(dtype: mx.Dtype) -> Kernel:
    """The kernel for activations of a type."""
    planes = PACKINGS["q8_0"].names("w")
    defined = f"#define W {', '.join(planes)}\n" + DEFINED
    inputs = ["x", "table", *planes]
    return matmul.kernel("matmul", "q8_0", dtype, inputs, "out", BODY, defined)


def q8_matmul(planes: Planes, x: mx.array) -> mx.array:
    """x . W^T in x's type: planes of (out, in) or (G, out, in); x (N, in) or (G, N, in)."""
    *stack, count, columns = x.shape
    groups, width = (stack or [1])[0], planes["weight"].shape[-2]
    return kernel(x.dtype)(
        [x, lut("q8_0"), *(planes[p] for p in PACKINGS["q8_0"].planes)],
        [((*stack, count, width), x.dtype)],
        groups=(-(-width // matmul.WIDE), -(-count // tiles.rows(x.dtype)), groups),
        threads=matmul.THREADS,
        template=[
            ("T", x.dtype),
            ("WIDTH", width),
            ("COLUMNS", columns),
            ("STACKED", len(stack)),
        ],
    )[0]


def reference(planes: Planes, x: mx.array) -> mx.array:
    """The same by MLX's own operations; float32."""
    return x.astype(mx.float32) @ mx.swapaxes(FORMATS["q8_0"].decode(planes), -1, -2)
