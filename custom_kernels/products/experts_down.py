"""Down of the chosen experts of a few tokens, summed over the experts: one launch.

A token's hidden values of all its experts lie side by side, so a row of the result is one long
product whose weights change with the expert; a SIMD-group makes ROWS rows, with one sum at the end.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.formats.base import Format, Planes

ROWS = 2  # values of the result that a SIMD-group makes
GROUPS = 16  # SIMD-groups of a threadgroup
STAGED = 24576  # bytes of staged hidden values at a time

DECLARED = """
    threadgroup uint4 xs[XS];
    threadgroup float scales[STAGED / 32];
    threadgroup float sums[STAGED / 16];
    uint lane = thread_index_in_simdgroup, at = thread_index_in_threadgroup;
"""

# Part `part` of the rows, for token `token`.
PRODUCTS = """
    uint row0 = (part * GROUPS + simdgroup_index_in_threadgroup) * ROWS;
    int mine = int(experts[token * TOPK + min(lane, uint(TOPK - 1))]);
    const uint per = COLUMNS / 64, end = TOPK * per;

    Pack down[ROWS];
    float ys[ROWS];
    uint slot = min(lane, end - 1) / per;
    uint first = uint(simd_shuffle(mine, ushort(slot))) * WIDTH;
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        uint row = first + min(row0 + r, uint(WIDTH - 1));
        down[r] = load_pack(DOWN, row, min(lane, end - 1) - slot * per, COLUMNS);
        ys[r] = 0;
    }
    for (uint base = 0; base < TOPK * COLUMNS; base += STAGED) {
        uint columns = min(uint(STAGED), TOPK * COLUMNS - base);
        if (base) threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(hidden + token * TOPK * COLUMNS + base, columns, xs, scales, sums, STAGED / 64, at,
              GROUPS * 32);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        // All lanes go round together, because they ask each other for the next expert.
        for (uint c0 = base / 64; c0 < (base + columns) / 64; c0 += 32) {
            uint c = c0 + lane, k = c - base / 64, next = min(c + 32, end - 1);
            slot = next / per;
            first = uint(simd_shuffle(mine, ushort(slot))) * WIDTH;
            Pack down1[ROWS];
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) {
                uint row = first + min(row0 + r, uint(WIDTH - 1));
                down1[r] = load_pack(DOWN, row, next - slot * per, COLUMNS);
            }
            #pragma unroll
            for (uint h = 0; h < 2; h++) {
                if (c >= (base + columns) / 64) break;
                pair v[16];
                fetch(xs, STAGED / 64, k, h, v);
                float scale = scales[h * (STAGED / 64) + k];
                float sum0 = sums[2 * h * (STAGED / 64) + k];
                float sum1 = sums[(2 * h + 1) * (STAGED / 64) + k];
                #pragma unroll
                for (uint r = 0; r < ROWS; r++)
                    ys[r] += dot_group(down[r], h, v, scale, sum0, sum1, xs);
            }
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) down[r] = down1[r];
        }
    }
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        float y = simd_sum(ys[r]);
        if (lane == 0 && row0 + r < WIDTH) PUT_ROUTED(row0 + r, y);
    }
"""

PUT = "#define PUT_ROUTED(row, y) routed[token * WIDTH + (row)] = y\n"

BODY = (
    DECLARED
    + "uint part = threadgroup_position_in_grid.x, token = threadgroup_position_in_grid.y;"
    + PRODUCTS
)


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool) -> Kernel:
    """The kernel for experts in a format and hidden values of a type."""
    inputs = ["hidden", "experts", *PACKINGS[format].names("down")]
    name = f"experts_down_{format}_{staging.arithmetic(dtype, eight)}"
    text = header(format, dtype, eight, "(STAGED / 32 * WORDS)", PUT)
    return Kernel(name, inputs, ["routed"], BODY, text)


def header(format: str, dtype: mx.Dtype, eight: bool, words: str, put: str) -> str:
    """What the body stands on; `words`: the 16-byte words of what is staged; `put`: where sums go."""
    packing = PACKINGS[format]
    assert not packing.lut, "no table of points is staged"
    names = f"#define DOWN {', '.join(packing.names('down'))}\n#define XS {words}\n"
    return names + put + staging.products(packing, dtype, eight)


def experts_down(
    format: str, down: Planes, hidden: mx.array, experts: mx.array, eight: bool = False
) -> mx.array:
    """Sum over a token's experts of down . hidden.

    hidden (N * k, H), weighted; experts int (N, k); planes of (E, D, H) -> float32 (N, D).
    eight: round the hidden values to bytes, as in experts_up.
    """
    packing, (count, topk) = PACKINGS[format], experts.shape
    width = down["weight"].shape[-2]
    return kernel(format, hidden.dtype, eight)(
        [hidden, experts, *(down[p] for p in packing.planes)],
        [((count, width), mx.float32)],
        groups=(-(-width // (ROWS * GROUPS)), count, 1),
        threads=32 * GROUPS,
        template=template(hidden.dtype, hidden.shape[-1], width, topk),
        reads=parts(packing.names("down"), experts.size, len(down["weight"])),
    )[0]


def template(dtype: mx.Dtype, columns: int, width: int, topk: int) -> list[tuple[str, Any]]:
    """The template of a launch that makes rows of `width` values of hidden ones, (N * k, columns)."""
    return [
        ("WIDTH", width),
        ("COLUMNS", columns),
        ("TOPK", topk),
        ("ROWS", ROWS),
        ("GROUPS", GROUPS),
        ("STAGED", staging.staged_columns(dtype, topk * columns, STAGED)),
    ]


def reference(found: Format, down: Planes, hidden: mx.array, experts: mx.array) -> mx.array:
    """The same by MLX's own operations, decoding every chosen expert; float32 (N, D)."""
    weight = found.decode({p: a[experts.flatten()] for p, a in down.items()})
    out = hidden.astype(mx.float32)[:, None] @ mx.swapaxes(weight, -1, -2)
    return out.reshape(*experts.shape, -1).sum(1)
