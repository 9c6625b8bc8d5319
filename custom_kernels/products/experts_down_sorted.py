"""Down of many float32 tokens, sorted by expert, and the sum over each token's experts: two launches.

The first is a grouped tiled product that puts each row back in its pair's place; the second adds a
token's rows in float32.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import lut
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import matmul
from ds4mlx.formats.base import Planes

BODY = (
    matmul.START
    + """
    uint tile = threadgroup_position_in_grid.y, column0 = threadgroup_position_in_grid.x * WIDE;
    uint expert = uint(tiles[4 * tile]), row0 = uint(tiles[4 * tile + 1]);
    uint rows = uint(tiles[4 * tile + 2]);
    if (rows == 0) return;
"""
    + matmul.LOOP
    + """
    #pragma unroll
    for (uint i = 0; i < 2; i++) {
        #pragma unroll
        for (uint j = 0; j < across; j++) {
            uint r = down + TALL / 2 * i + lane / 2;
            uint column = column0 + right + 16 * j + lane % 2 * 8;
            if (r < rows) {
                uint place = order[row0 + r];
                for (uint n = 0; n < 8 && column + n < WIDTH; n++)
                    parts[place * WIDTH + column + n] = c[i][j].v[n];
            }
        }
    }
"""
)

DEFINED = """
#define A_ROW(i) (row0 + (i))
#define GROUP(b, g) \\
  load_group(DOWN, expert * WIDTH + min(column0 + (b), uint(WIDTH - 1)), g, COLUMNS)
"""

SUM = """
    uint d = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
    uint token = threadgroup_position_in_grid.y;
    if (d >= WIDTH) return;
    float sum = 0;
    for (uint k = 0; k < TOPK; k++) sum += float(parts[(token * TOPK + k) * WIDTH + d]);
    out[token * WIDTH + d] = sum;
"""


@lru_cache
def kernel(format: str) -> Kernel:
    """The product for experts in a format."""
    down = PACKINGS[format].names("down")
    defined = f"#define DOWN {', '.join(down)}\n" + DEFINED
    inputs = ["x", "order", "tiles", "table", *down]
    name = "experts_down_sorted"
    return matmul.kernel(name, format, inputs, "parts", BODY, defined)


@lru_cache
def sum_kernel() -> Kernel:
    """The sum over a token's experts."""
    return Kernel("experts_sum", ["parts"], ["out"], SUM)


def experts_down_sorted(
    format: str, down: Planes, hidden: mx.array, order: mx.array, jobs: mx.array, topk: int
) -> mx.array:
    """Like experts_down, from hidden float32 (N * k, H) in the order of the sorted pairs; float32 (N, D).

    order uint32 (N * k,): pair t * k + slot of each sorted row; jobs: `expert_tiles`.
    """
    packing, (pairs, columns) = PACKINGS[format], hidden.shape
    width = down["weight"].shape[-2]
    (parts,) = kernel(format)(
        [hidden, order, jobs, lut(format), *(down[p] for p in packing.planes)],
        [((pairs, width), mx.float32)],
        groups=(-(-width // matmul.WIDE), jobs.shape[0], 1),
        threads=matmul.THREADS,
        template=[("WIDTH", width), ("COLUMNS", columns)],
    )
    return summed(parts, topk)


def summed(parts: mx.array, topk: int) -> mx.array:
    """Sums over each token's `topk` rows of parts (N * k, D), float32 (N, D)."""
    pairs, width = parts.shape
    return sum_kernel()(
        [parts],
        [((pairs // topk, width), mx.float32)],
        groups=(-(-width // 256), pairs // topk, 1),
        threads=256,
        template=[("WIDTH", width), ("TOPK", topk)],
    )[0]
