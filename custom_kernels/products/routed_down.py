"""Down of the routed experts and of the shared one: two jobs in one launch, told apart by threadgroup.

The first threadgroups sum over a token's experts, as `experts_down` does. The others go through the rows
of the shared expert's matrix once for all tokens, whose hidden values each of them makes for itself.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.packs import PACKINGS
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.custom_kernels.products import dense_matvec_text as dense
from ds4mlx.custom_kernels.products import experts, experts_down, swiglu
from ds4mlx.custom_kernels.products.columns import Columns
from ds4mlx.custom_kernels.products.routed import Routed
from ds4mlx.formats import FORMATS, Planes

ROWS = 2  # of the shared matrix, that a SIMD-group takes
# Hidden values of the shared expert that are staged at a time, in whole steps of a SIMD-group.
STAGED, STEP = 6144, 512

_HEADER = """
#define MOST(a, b) ((a) > (b) ? (a) : (b))
// A value as it is stored in type T.
template <typename T> inline float stored(float v) { return float(static_cast<T>(v)); }
template <typename T> inline uint hidden_of(float gate, float up, float limit) {
  return as_type<uint>(stored<T>(swiglu(stored<T>(gate), stored<T>(up), limit)));
}
"""

# Quad q of piece c of token t lies at (t * quads of a piece + q) * pieces + c.
SHARED = """
    uint row0 = (part * GROUPS + simdgroup_index_in_threadgroup) * SHARED_ROWS;
    const uint quads = DENSE::COLUMNS / 4, pieces = SPAN / DENSE::COLUMNS;
    const uint last = INNER / DENSE::COLUMNS - 1;
    float limit = as_type<float>(LIMIT);
    uint4 codes[SHARED_ROWS];
    float by[SHARED_ROWS], ys[SHARED_ROWS][TOKENS];
    #pragma unroll
    for (uint r = 0; r < SHARED_ROWS; r++) {
        uint row = min(row0 + r, uint(WIDTH - 1));
        codes[r] = w.load(row, min(lane, last), INNER);
        by[r] = w.scale(row, min(lane, last), INNER);
        #pragma unroll
        for (uint t = 0; t < TOKENS; t++) ys[r][t] = 0;
    }
    for (uint base = 0; base < INNER; base += SPAN) {
        uint columns = min(uint(SPAN), INNER - base);
        if (base) threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = at; i < TOKENS * (columns / 4); i += GROUPS * 32) {
            uint t = i / (columns / 4), j = i % (columns / 4);
            if (t >= tokens) {
                uint4 none;
                none.x = none.y = none.z = none.w = 0;
                xs[(t * quads + j % quads) * pieces + j / quads] = none;
                continue;
            }
            float4 g = ((const device float4*)(products + t * ALL + GATES_AT + base))[j];
            float4 u = ((const device float4*)(products + t * ALL + UPS_AT + base))[j];
            uint4 v;
            v.x = hidden_of<T>(g.x, u.x, limit);
            v.y = hidden_of<T>(g.y, u.y, limit);
            v.z = hidden_of<T>(g.z, u.z, limit);
            v.w = hidden_of<T>(g.w, u.w, limit);
            xs[(t * quads + j % quads) * pieces + j / quads] = v;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint c = base / DENSE::COLUMNS + lane; c < (base + columns) / DENSE::COLUMNS; c += 32) {
            uint k = c - base / DENSE::COLUMNS;
            uint4 codes1[SHARED_ROWS];
            float by1[SHARED_ROWS], sum[SHARED_ROWS][TOKENS];
            #pragma unroll
            for (uint r = 0; r < SHARED_ROWS; r++) {
                uint row = min(row0 + r, uint(WIDTH - 1));
                codes1[r] = w.load(row, min(c + 32, last), INNER);
                by1[r] = w.scale(row, min(c + 32, last), INNER);
            }
            #pragma unroll
            for (uint q = 0; q < quads; q++) {
                float v[SHARED_ROWS][4];
                #pragma unroll
                for (uint r = 0; r < SHARED_ROWS; r++) DENSE::quad(codes[r], q, v[r]);
                #pragma unroll
                for (uint t = 0; t < TOKENS; t++) {
                    uint4 a = xs[(t * quads + q) * pieces + k];
                    #pragma unroll
                    for (uint r = 0; r < SHARED_ROWS; r++) {
                        float s = q ? sum[r][t] : 0.0f;
                        s = fma(v[r][0], as_type<float>(a.x), s);
                        s = fma(v[r][1], as_type<float>(a.y), s);
                        s = fma(v[r][2], as_type<float>(a.z), s);
                        sum[r][t] = fma(v[r][3], as_type<float>(a.w), s);
                    }
                }
            }
            #pragma unroll
            for (uint r = 0; r < SHARED_ROWS; r++) {
                #pragma unroll
                for (uint t = 0; t < TOKENS; t++) ys[r][t] = fma(by[r], sum[r][t], ys[r][t]);
                codes[r] = codes1[r];
                by[r] = by1[r];
            }
        }
    }
    #pragma unroll
    for (uint r = 0; r < SHARED_ROWS; r++) {
        #pragma unroll
        for (uint t = 0; t < TOKENS; t++) {
            float y = simd_sum(ys[r][t]);
            if (lane == 0 && t < tokens && row0 + r < WIDTH) PUT_SHARED(t, row0 + r, y);
        }
    }
"""

# Where the experts' numbers are.
EXPERTS = "const device int* experts = (const device int*)(hidden + tokens * TOPK * COLUMNS);"

PUT = "#define PUT_SHARED(t, row, y) shared[(t) * WIDTH + (row)] = y\n"

_BODY = """
%s
    uint part = threadgroup_position_in_grid.x;
    uint tokens = uint(hidden_shape[0]) / (TOPK * (COLUMNS + 4 / uint(sizeof(T))));
    %s
    if (part < PARTS * tokens) {
        uint token = part / PARTS;
        part %%= PARTS;
%s
    } else {
        part -= PARTS * tokens;
        DENSE w;
        %s
%s
    }
"""


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool, dense_format: str) -> Kernel:
    """The kernel for routed experts in a format, hidden values of a type, and a shared expert."""
    planes = {plane: f"dense_{plane}" for plane in FORMATS[dense_format].layout}
    taken = " ".join(f"w.{plane} = {name};" for plane, name in planes.items())
    body = _BODY % (experts_down.DECLARED, EXPERTS, experts_down.PRODUCTS, taken, SHARED)
    header = shared_header(format, dtype, eight, dense_format, experts_down.PUT + PUT)
    inputs = ["hidden", "products", *PACKINGS[format].names("down")]
    name = _name(format, dtype, eight, dense_format)
    return Kernel(name, [*inputs, *planes.values()], ["routed", "shared"], body, header)


def shared_header(format: str, dtype: mx.Dtype, eight: bool, dense_format: str, put: str) -> str:
    """What both jobs stand on; `put`: where their sums go."""
    words = "MOST(STAGED / 32 * WORDS, TOKENS * SPAN / 4)"
    header = experts_down.header(format, dtype, eight, words, put)
    header += swiglu.HEADER + _HEADER + dense.LOAD4 + dense.FORMATS[dense_format]
    return header + f"#define DENSE {dense.STRUCTS[dense_format]}\n"


def _name(format: str, dtype: mx.Dtype, eight: bool, dense_format: str) -> str:
    return f"routed_down_{format}_{staging.arithmetic(dtype, eight)}_{dense_format}"


class Shared(NamedTuple):
    """The shared expert: planes of its down (D, F) in a format, and what gate and up gave, float32 (N, F).

    limit: of SwiGLU.
    """

    format: str
    down: Planes
    gates: Columns
    ups: Columns
    limit: float

    @property
    def inner(self) -> int:
        """F, the hidden values of a token."""
        return self.gates.width

    @property
    def aligned(self) -> bool:
        """Whether both products lie in one array, four values of a token to a load."""
        return self.gates.array is self.ups.array and self.gates.aligned and self.ups.aligned


def routed_down(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    *,
    dtype: mx.Dtype,
    eight: bool = False,
) -> tuple[mx.array, mx.array]:
    """The routed experts' sum and the shared expert's values, both float32 (N, D).

    values: T (N * k, H), weighted, of experts with planes of (E, D, H). The shared expert's
    products are rounded to `dtype`, which is T, as is their SwiGLU. eight: as in `experts_down`.
    """
    way = by_kernel if takes(format, values, shared, eight) else plain
    return way(format, down, values, shared, dtype=dtype, eight=eight)


def takes(
    format: str,
    values: Routed,
    shared: Shared,
    eight: bool = False,
) -> bool:
    """Whether the kernel multiplies values (N * k, H) and (N, F) by matrices in the formats."""
    if not suits(format, values, shared):
        return False
    # How a shared format is read is compared as `dense_matvec`, which has the same text.
    name = _name(format, values.dtype, eight, shared.format).removesuffix(f"_{shared.format}")
    return dispatch.active(values.array, name)


def suits(format: str, values: Routed, shared: Shared) -> bool:
    """Whether sizes and formats are such as the text takes."""
    chunks = values.width % staging.CHUNK == 0
    few = values.topk <= dispatch.MOST_CHOSEN and values.tokens <= dispatch.FEW
    piece = dense.COLUMNS.get(shared.format)
    read = piece is not None and shared.inner % piece == 0 and shared.aligned
    return format in experts.DOWN.formats and chunks and few and read


def plain(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    *,
    dtype: mx.Dtype,
    eight: bool = False,
) -> tuple[mx.array, mx.array]:
    """`routed_down` by MLX's own operations, which know no bytes."""
    stack = lambda *each: FORMATS[format].gather(down, *each)
    pairs = experts.Pairs(values.chosen, None, None)
    routed = experts.plain_down(stack, values.hidden, pairs)
    gates, ups = (each.value.astype(dtype) for each in (shared.gates, shared.ups))
    inner = swiglu.swiglu(gates, ups, shared.limit).astype(dtype)
    return routed, FORMATS[shared.format].matmul(shared.down, inner).astype(mx.float32)


def by_kernel(
    format: str,
    down: Planes,
    values: Routed,
    shared: Shared,
    *,
    dtype: mx.Dtype,
    eight: bool = False,
) -> tuple[mx.array, mx.array]:
    """`routed_down` in one launch; H is a multiple of 64, F of a piece's columns, k at most 32."""
    assert values.dtype == dtype
    count, width = values.tokens, down["weight"].shape[-2]
    each, rest = experts_down.ROWS * experts_down.GROUPS, ROWS * experts_down.GROUPS
    sums = kernel(format, dtype, eight, shared.format)(
        [values.array, shared.gates.array, *planes_of(format, down, shared)],
        [((count, width), mx.float32), ((count, width), mx.float32)],
        groups=(-(-width // each) * count + -(-width // rest), 1, 1),
        threads=32 * experts_down.GROUPS,
        template=[*template(values, shared, width), ("PARTS", -(-width // each))],
        reads=parts(PACKINGS[format].names("down"), count * values.topk, len(down["weight"])),
    )
    return sums[0], sums[1]


def planes_of(format: str, down: Planes, shared: Shared) -> list[mx.array]:
    """The arrays of both matrices."""
    own = [down[plane] for plane in PACKINGS[format].planes]
    return own + [shared.down[plane] for plane in FORMATS[shared.format].layout]


def template(values: Routed, shared: Shared, width: int) -> list[tuple[str, Any]]:
    """What the text of both jobs is told, for rows of `width` values."""
    padded, inner = dispatch.made_up(values.tokens), shared.inner
    return [
        ("T", values.dtype),
        *experts_down.template(values.dtype, values.width, width, values.topk),
        ("TOKENS", padded),
        ("INNER", inner),
        ("ALL", shared.gates.array.shape[1]),
        ("GATES_AT", shared.gates.begin),
        ("UPS_AT", shared.ups.begin),
        ("SPAN", min(inner, max(STEP, STAGED // padded // STEP * STEP))),
        ("SHARED_ROWS", ROWS),
        ("LIMIT", bits(shared.limit)),
    ]
