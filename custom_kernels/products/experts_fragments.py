"""The routed experts of many bfloat16 tokens, sorted by expert: gate and up, then down, by `fragments`.

Of gate's and up's rows a lane has the same, so that clamp, SwiGLU and weight are applied in registers.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import bits, lut
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.products import experts_down_sorted, fragments, swiglu
from ds4mlx.formats.base import Planes

UP = (
    fragments.START
    + """
    uint column0 = threadgroup_position_in_grid.x * (16 * GROUPS) + 16 * sg;
"""
    + fragments.LOOP
    + """
    float limit = as_type<float>(LIMIT);
    uint column = column0 + 2 * g;
    #pragma unroll
    for (uint t = 0; t < TALL / 8; t++) {
        #pragma unroll
        for (uint e = 0; e < 2; e++) {
            uint r = 8 * t + 2 * q + e;
            if (r < rows && column < HIDDEN) {
                float weight = float(weights[order[row0 + r]]);
                float a = swiglu(sum(c[0][t], 0, e), sum(c[1][t], 0, e), limit) * weight;
                float b = swiglu(sum(c[0][t], 1, e), sum(c[1][t], 1, e), limit) * weight;
                ((device uint*)hidden)[((row0 + r) * HIDDEN + column) / 2] = two_bf16(a, b);
            }
        }
    }
"""
)
UP_DEFINED = """
#define A_ROW(i) (order[row0 + (i)] / TOPK)
#define ROW(h) (expert * HIDDEN + min(column0 + 2 * g + (h), uint(HIDDEN - 1)))
#define GROUP(m, h, c) \\
  ((m) ? load_group(UP, ROW(h), 4 * (c) + q, COLUMNS) : load_group(GATE, ROW(h), 4 * (c) + q, COLUMNS))
"""

DOWN = (
    fragments.START
    + """
    uint column0 = threadgroup_position_in_grid.x * (32 * GROUPS) + 32 * sg;
"""
    + fragments.LOOP
    + """
    #pragma unroll
    for (uint t = 0; t < TALL / 8; t++) {
        #pragma unroll
        for (uint e = 0; e < 2; e++) {
            uint r = 8 * t + 2 * q + e;
            if (r >= rows) continue;
            uint place = order[row0 + r];
            #pragma unroll
            for (uint m = 0; m < 2; m++) {
                uint column = column0 + 16 * m + 2 * g;
                if (column < WIDTH)
                    ((device uint*)parts)[(place * WIDTH + column) / 2] =
                        two_bf16(sum(c[m][t], 0, e), sum(c[m][t], 1, e));
            }
        }
    }
"""
)
DOWN_DEFINED = """
#define A_ROW(i) (row0 + (i))
#define ROW(m, h) (expert * WIDTH + min(column0 + 16 * (m) + 2 * g + (h), uint(WIDTH - 1)))
#define GROUP(m, h, c) load_group(DOWN, ROW(m, h), 4 * (c) + q, COLUMNS)
"""


@lru_cache
def up_kernel(format: str, tall: int) -> Kernel:
    """Gate and up of experts in a format, for tiles of so many rows."""
    gate, up = (PACKINGS[format].names(matrix) for matrix in ("gate", "up"))
    names = f"#define GATE {', '.join(gate)}\n#define UP {', '.join(up)}\n"
    inputs = ["x", "order", "tiles", "weights", "table", *gate, *up]
    text = swiglu.HEADER + names + UP_DEFINED
    name = f"experts_up_fragments_{format}_{tall}"
    return fragments.kernel(name, format, inputs, "hidden", UP, text)


@lru_cache
def down_kernel(format: str, tall: int) -> Kernel:
    """Down of experts in a format, for tiles of so many rows."""
    down = PACKINGS[format].names("down")
    inputs = ["x", "order", "tiles", "table", *down]
    text = f"#define DOWN {', '.join(down)}\n" + DOWN_DEFINED
    name = f"experts_down_fragments_{format}_{tall}"
    return fragments.kernel(name, format, inputs, "parts", DOWN, text)


def experts_up_fragments(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array,
    order: mx.array,
    jobs: mx.array,
    weights: mx.array,
    limit: float,
    tall: int,
) -> mx.array:
    """As `experts_up_sorted`, of bfloat16 x and jobs of at most `tall` rows; H is even.

    D is a multiple of `fragments.COLUMNS`, and tall one of `fragments.GROUPS`.
    """
    packing, (count, columns) = PACKINGS[format], x.shape
    hidden = gate["weight"].shape[-2]
    planes = [m[p] for m in (gate, up) for p in packing.planes]
    return up_kernel(format, tall)(
        [x, order, jobs, weights, lut(format), *planes],
        [((order.size, hidden), x.dtype)],
        groups=(-(-hidden // (16 * fragments.GROUPS[tall])), jobs.shape[0], 1),
        threads=32 * fragments.GROUPS[tall],
        template=[
            *fragments.template(columns, tall),
            ("HIDDEN", hidden),
            ("TOPK", order.size // count),
            ("LIMIT", bits(limit)),
        ],
    )[0]


def experts_down_fragments(
    format: str,
    down: Planes,
    hidden: mx.array,
    order: mx.array,
    jobs: mx.array,
    topk: int,
    tall: int,
) -> mx.array:
    """As `experts_down_sorted`, of bfloat16 values and jobs of at most `tall` rows; D is even.

    H is a multiple of `fragments.COLUMNS`, and tall one of `fragments.GROUPS`.
    """
    packing, (pairs, columns) = PACKINGS[format], hidden.shape
    width = down["weight"].shape[-2]
    (parts,) = down_kernel(format, tall)(
        [hidden, order, jobs, lut(format), *(down[p] for p in packing.planes)],
        [((pairs, width), hidden.dtype)],
        groups=(-(-width // (32 * fragments.GROUPS[tall])), jobs.shape[0], 1),
        threads=32 * fragments.GROUPS[tall],
        template=[*fragments.template(columns, tall), ("WIDTH", width)],
    )
    return experts_down_sorted.summed(parts, topk)
