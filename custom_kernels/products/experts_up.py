"""Gate and up of the chosen experts of a few tokens, clamped, multiplied and weighted: one launch.

A SIMD-group makes ROWS hidden values of one (token, expert) pair: it loads the codes of ROWS rows of
gate and of up, 16 bytes a lane and more, before it waits for the token's activations to be staged.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import bits, lut
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.custom_kernels.products import swiglu
from ds4mlx.custom_kernels.products.columns import Inside
from ds4mlx.formats.base import Format, Planes

ROWS = 2  # hidden values a SIMD-group makes at a time
SETS = 2  # times it does so, if all activations are staged at once
GROUPS = 12  # SIMD-groups of a threadgroup
STAGED = 8192  # bytes of staged activations at a time

DECLARED = """
    threadgroup uint4 xs[STAGED / 64 * 2 * WORDS];
    threadgroup float scales[STAGED / 32];
    threadgroup float sums[STAGED / 16];
    threadgroup uint4 lut[LUT * BANKS];
    uint lane = thread_index_in_simdgroup, at = thread_index_in_threadgroup;
    uint job = threadgroup_position_in_grid.y;
    uint row0 = threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup;
    row0 *= SETS * ROWS;
"""

# The first threads, FREE of them, have something else to do meanwhile.
STAGING = """
    if (at >= FREE) {
        if (LUT > 1) {
            for (uint i = at - FREE; i < TABLE * BANKS; i += GROUPS * 32 - FREE)
                lut[i] = ((const device uint4*)table)[i / BANKS];
        }
        stage(activations, min(uint(STAGED), uint(COLUMNS)), xs, scales, sums, STAGED / 64,
              at - FREE, GROUPS * 32 - FREE);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""

# Of expert `chosen`.
LOADS = """
    uint first = uint(chosen) * HIDDEN;
    const uint last = COLUMNS / 64 - 1;
    Pack gate[ROWS], up[ROWS];
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        uint row = first + min(row0 + r, uint(HIDDEN - 1));
        gate[r] = load_pack(GATE, row, min(lane, last), COLUMNS);
        up[r] = load_pack(UP, row, min(lane, last), COLUMNS);
    }
"""

# With the weight `weight` of the expert.
PRODUCTS = """
    const threadgroup uint4* points = lut + (LUT > 1 ? lane % BANKS : 0u);
    float limit = as_type<float>(LIMIT);
    for (uint set = 0; set < SETS; set++, row0 += ROWS) {
        float gates[ROWS], ups[ROWS];
        #pragma unroll
        for (uint r = 0; r < ROWS; r++) gates[r] = ups[r] = 0;
        uint c = lane;
        for (uint base = 0; base < COLUMNS; base += STAGED) {
            uint columns = min(uint(STAGED), COLUMNS - base);
            if (STAGED < COLUMNS && set + base > 0) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                stage(activations + base, columns, xs, scales, sums, STAGED / 64, at, GROUPS * 32);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            for (; c < (base + columns) / 64; c += 32) {
                // What comes next: of these rows, of the next set's, or nothing.
                bool end = c + 32 > last;
                uint k = c - base / 64, ahead = end && set + 1 < SETS ? ROWS : 0;
                uint next = ahead ? lane : min(c + 32, last);
                Pack gate1[ROWS], up1[ROWS];
                #pragma unroll
                for (uint r = 0; r < ROWS; r++) {
                    uint row = first + min(row0 + ahead + r, uint(HIDDEN - 1));
                    gate1[r] = load_pack(GATE, row, next, COLUMNS);
                    up1[r] = load_pack(UP, row, next, COLUMNS);
                }
                #pragma unroll
                for (uint h = 0; h < 2; h++) {
                    pair v[16];
                    fetch(xs, STAGED / 64, k, h, v);
                    float scale = scales[h * (STAGED / 64) + k];
                    float sum0 = sums[2 * h * (STAGED / 64) + k];
                    float sum1 = sums[(2 * h + 1) * (STAGED / 64) + k];
                    #pragma unroll
                    for (uint r = 0; r < ROWS; r++) {
                        gates[r] += dot_group(gate[r], h, v, scale, sum0, sum1, points);
                        ups[r] += dot_group(up[r], h, v, scale, sum0, sum1, points);
                    }
                }
                #pragma unroll
                for (uint r = 0; r < ROWS; r++) {
                    gate[r] = gate1[r];
                    up[r] = up1[r];
                }
            }
        }
        #pragma unroll
        for (uint r = 0; r < ROWS; r++) {
            float y = swiglu(simd_sum(gates[r]), simd_sum(ups[r]), limit);
            if (lane == 0 && row0 + r < HIDDEN)
                hidden[job * HIDDEN + row0 + r] = static_cast<T>(y * weight);
        }
    }
"""

GIVEN = """
    const device T* activations = x + (job / TOPK) * COLUMNS;
    int chosen = int(experts[job]);
    float weight = float(weights[job]);
"""

BODY = DECLARED + GIVEN + LOADS + STAGING + PRODUCTS


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool) -> Kernel:
    """The kernel for experts in a format and activations of a type, or as bytes."""
    inputs = ["x", "experts", "weights", *planes(format)]
    name = f"experts_up_{format}_{staging.arithmetic(dtype, eight)}"
    return Kernel(name, inputs, ["hidden"], BODY, header(format, dtype, eight, 0))


def planes(format: str) -> list[str]:
    """The inputs that hold the table and the matrices."""
    packing = PACKINGS[format]
    return ["table", *packing.names("gate"), *packing.names("up")]


def header(format: str, dtype: mx.Dtype, eight: bool, free: int) -> str:
    """What the body stands on; `free` threads are kept from staging."""
    packing = PACKINGS[format]
    gate, up = ", ".join(packing.names("gate")), ", ".join(packing.names("up"))
    names = f"#define GATE {gate}\n#define UP {up}\n#define FREE {free}u\n"
    return names + swiglu.HEADER + staging.products(packing, dtype, eight)


def operands(format: str, gate: Planes, up: Planes, eight: bool) -> list[mx.array]:
    """The arrays of `planes`."""
    listed = PACKINGS[format].planes
    return [lut(format, eight), *(matrix[plane] for matrix in (gate, up) for plane in listed)]


def cut(
    x: mx.array | Inside, hidden: int, topk: int, format: str, limit: float, eight: bool
) -> dict[str, Any]:
    """Threadgroups, threads and template of a launch for tokens x (N, D)."""
    columns = x.shape[1]
    staged = staging.staged_columns(x.dtype, columns, STAGED)
    sets = SETS if staged == columns else 1
    return {
        "groups": (-(-hidden // (ROWS * sets * GROUPS)), x.shape[0] * topk, 1),
        "threads": 32 * GROUPS,
        "template": [
            ("T", x.dtype),
            ("HIDDEN", hidden),
            ("COLUMNS", columns),
            ("TOPK", topk),
            ("ROWS", ROWS),
            ("SETS", sets),
            ("GROUPS", GROUPS),
            ("TABLE", lut(format, eight).size // 4),
            ("STAGED", staged),
            ("LIMIT", bits(limit)),
        ],
    }


def experts_up(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    limit: float,
    eight: bool = False,
) -> mx.array:
    """weight * silu(min(gate . x, limit)) * clip(up . x) of every chosen expert.

    x (N, D); experts int (N, k); weights float32 (N, k); planes of (E, H, D) -> (N * k, H) in x's type.
    eight: round the activations to bytes; for formats whose packing has such a product.
    """
    (count, topk), hidden = experts.shape, gate["weight"].shape[-2]
    return kernel(format, x.dtype, eight)(
        [x, experts, weights, *operands(format, gate, up, eight)],
        [((count * topk, hidden), x.dtype)],
        **cut(x, hidden, topk, format, limit, eight),
        reads=parts(planes(format)[1:], count * topk, len(gate["weight"])),
    )[0]


def reference(
    found: Format,
    gate: Planes,
    up: Planes,
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    limit: float,
) -> mx.array:
    """The same by MLX's own operations, decoding every chosen expert; float32 (N * k, H)."""
    x = mx.repeat(x.astype(mx.float32), experts.shape[1], axis=0)[:, None]
    gates, ups = (
        (x @ mx.swapaxes(found.decode({p: a[experts.flatten()] for p, a in m.items()}), -1, -2))
        for m in (gate, up)
    )
    return (swiglu.swiglu(gates, ups, limit) * weights.reshape(-1, 1, 1)).squeeze(1)
