"""Gate and up of the chosen experts of a few tokens, clamped, multiplied and weighted: one launch.

A SIMD-group makes ROWS hidden values of one (token, expert) pair: it loads the codes of ROWS rows of
gate and of up, 16 bytes a lane and more, before it waits for the token's activations to be staged.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import bits, lut
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.custom_kernels.products import swiglu
from ds4mlx.formats.base import Format, Planes

ROWS = 2  # hidden values a SIMD-group makes
GROUPS = 8  # SIMD-groups of a threadgroup
STAGED = 16384  # bytes of staged activations at a time

BODY = """
    threadgroup uint4 xs[STAGED / 64 * 2 * WORDS];
    threadgroup float scales[STAGED / 32];
    threadgroup float sums[STAGED / 16];
    threadgroup uint4 lut[LUT];
    uint lane = thread_index_in_simdgroup, at = thread_index_in_threadgroup;
    uint job = threadgroup_position_in_grid.y;
    uint row0 = (threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup) * ROWS;
    uint first = uint(experts[job]) * HIDDEN;

    Pack gate[ROWS], up[ROWS];
    float gates[ROWS], ups[ROWS];
    uint c = lane, last = COLUMNS / 64 - 1;
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        uint row = first + min(row0 + r, uint(HIDDEN - 1));
        gate[r] = load_pack(GATE, row, min(c, last), COLUMNS);
        up[r] = load_pack(UP, row, min(c, last), COLUMNS);
        gates[r] = ups[r] = 0;
    }
    if (LUT > 1) {
        for (uint i = at; i < TABLE; i += GROUPS * 32) lut[i] = ((const device uint4*)table)[i];
    }
    for (uint base = 0; base < COLUMNS; base += STAGED) {
        uint columns = min(uint(STAGED), COLUMNS - base);
        if (base) threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(x + (job / TOPK) * COLUMNS + base, columns, xs, scales, sums, STAGED / 64, at,
              GROUPS * 32);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (; c < (base + columns) / 64; c += 32) {
            uint k = c - base / 64, next = min(c + 32, last);
            Pack gate1[ROWS], up1[ROWS];
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) {
                uint row = first + min(row0 + r, uint(HIDDEN - 1));
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
                    gates[r] += dot_group(gate[r], h, v, scale, sum0, sum1, lut);
                    ups[r] += dot_group(up[r], h, v, scale, sum0, sum1, lut);
                }
            }
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) {
                gate[r] = gate1[r];
                up[r] = up1[r];
            }
        }
    }
    float limit = as_type<float>(LIMIT);
    #pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        float y = swiglu(simd_sum(gates[r]), simd_sum(ups[r]), limit);
        if (lane == 0 && row0 + r < HIDDEN) {
            y *= float(weights[job]);
            hidden[job * HIDDEN + row0 + r] = static_cast<T>(y);
        }
    }
"""


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool) -> Kernel:
    """The kernel for experts in a format and activations of a type, or as bytes."""
    packing = PACKINGS[format]
    gate, up = packing.names("gate"), packing.names("up")
    names = f"#define GATE {', '.join(gate)}\n#define UP {', '.join(up)}\n"
    text = swiglu.HEADER + staging.products(packing, dtype, eight)
    name = f"experts_up_{format}_{staging.arithmetic(dtype, eight)}"
    inputs = ["x", "experts", "weights", "table", *gate, *up]
    return Kernel(name, inputs, ["hidden"], BODY, names + text)


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
    packing, (count, topk) = PACKINGS[format], experts.shape
    hidden, columns = gate["weight"].shape[-2], x.shape[-1]
    planes = [m[p] for m in (gate, up) for p in packing.planes]
    return kernel(format, x.dtype, eight)(
        [x, experts, weights, lut(format, eight), *planes],
        [((count * topk, hidden), x.dtype)],
        groups=(-(-hidden // (ROWS * GROUPS)), count * topk, 1),
        threads=32 * GROUPS,
        template=[
            ("T", x.dtype),
            ("HIDDEN", hidden),
            ("COLUMNS", columns),
            ("TOPK", topk),
            ("ROWS", ROWS),
            ("GROUPS", GROUPS),
            ("TABLE", lut(format, eight).size // 4),
            ("STAGED", staging.staged_columns(x.dtype, columns, STAGED)),
            ("LIMIT", bits(limit)),
        ],
        reads=parts(
            [*packing.names("gate"), *packing.names("up")], experts.size, len(gate["weight"])
        ),
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
