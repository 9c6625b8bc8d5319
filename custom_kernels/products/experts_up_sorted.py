"""Gate and up of many float32 tokens, sorted by expert: a grouped tiled product, one launch.

A threadgroup takes up to TALL rows of one expert; of the weight rows that it decodes, each SIMD-group's
share is half gate and half up, so that clamp, SwiGLU and weight are applied where both are.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import bits, lut
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import matmul, swiglu
from ds4mlx.formats.base import Planes

BODY = (
    matmul.START
    + """
    uint tile = threadgroup_position_in_grid.y, column0 = threadgroup_position_in_grid.x * (WIDE / 2);
    uint expert = uint(tiles[4 * tile]), row0 = uint(tiles[4 * tile + 1]);
    uint rows = uint(tiles[4 * tile + 2]);
    if (rows == 0) return;
    PICK_PLANES;
"""
    + matmul.LOOP
    + """
    float limit = as_type<float>(LIMIT);
    #pragma unroll
    for (uint i = 0; i < 2; i++) {
        #pragma unroll
        for (uint j = 0; j < across / 2; j++) {
            uint r = down + TALL / 2 * i + lane / 2;
            if (r < rows) {
                float weight = float(weights[order[row0 + r]]);
                uint column = column0 + right / 2 + 16 * j + lane % 2 * 8;
                for (uint n = 0; n < 8 && column + n < HIDDEN; n++) {
                    float y = swiglu(c[i][j].v[n], c[i][j + across / 2].v[n], limit);
                    hidden[(row0 + r) * HIDDEN + column + n] = y * weight;
                }
            }
        }
    }
"""
)

# Weight row b of a tile: of each SIMD-group's SPAN rows the first half are gate's.
DEFINED = """
#define A_ROW(i) (order[row0 + (i)] / TOPK)
#define COLUMN_OF(b) min(column0 + (b) / SPAN * (SPAN / 2) + (b) % (SPAN / 2), uint(HIDDEN - 1))
#define IS_UP(b) ((b) % SPAN >= SPAN / 2)
#define GROUP(b, g) load_group(PICKED, expert * HIDDEN + COLUMN_OF(b), g, COLUMNS)
"""


@lru_cache
def kernel(format: str) -> Kernel:
    """The kernel for experts in a format."""
    packing = PACKINGS[format]
    gate, up, picked = (packing.names(matrix) for matrix in ("gate", "up", "picked"))
    picks = [
        f"auto {p} = IS_UP(at * 32 / DEEP) ? {u} : {g}"
        for p, u, g in zip(picked, up, gate, strict=True)
    ]
    names = f"#define PICKED {', '.join(picked)}\n#define PICK_PLANES {'; '.join(picks)}\n"
    inputs = ["x", "order", "tiles", "weights", "table", *gate, *up]
    name = "experts_up_sorted"
    return matmul.kernel(name, format, inputs, "hidden", BODY, swiglu.HEADER + names + DEFINED)


def experts_up_sorted(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array,
    order: mx.array,
    jobs: mx.array,
    weights: mx.array,
    limit: float,
) -> mx.array:
    """Like experts_up, in the order of the sorted pairs.

    x float32 (N, D); order uint32 (N * k,): pair t * k + slot of each sorted row; jobs: `expert_tiles`; weights
    float32 (N, k) -> (N * k, H).
    """
    packing, (count, columns) = PACKINGS[format], x.shape
    hidden = gate["weight"].shape[-2]
    planes = [m[p] for m in (gate, up) for p in packing.planes]
    return kernel(format)(
        [x, order, jobs, weights, lut(format), *planes],
        [((order.size, hidden), mx.float32)],
        groups=(-(-hidden // (matmul.WIDE // 2)), jobs.shape[0], 1),
        threads=matmul.THREADS,
        template=[
            ("HIDDEN", hidden),
            ("COLUMNS", columns),
            ("TOPK", order.size // count),
            ("LIMIT", bits(limit)),
        ],
    )[0]
