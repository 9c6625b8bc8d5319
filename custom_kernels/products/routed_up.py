"""Gate and up of the experts that each threadgroup finds for itself among the router's products.

As `experts_up`; but the expert of a (token, expert) pair and its weight are not known before: the first
SIMD-group of every threadgroup scores all experts of the token and chooses among them, while the others
stage the token's activations.
"""

from functools import lru_cache
from typing import NotRequired, TypedDict, Unpack

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel, parts
from ds4mlx.custom_kernels.layer import router
from ds4mlx.custom_kernels.layer.index_select import KEY_OF
from ds4mlx.custom_kernels.products import experts, experts_up
from ds4mlx.custom_kernels.products.columns import Columns, Inside
from ds4mlx.custom_kernels.products.routed import Routed, number_size, routed
from ds4mlx.formats import FORMATS, Planes

# Best first, the lowest number among equals. A key of 0 is no expert, or one that was taken.
_BEST = """
        float score[(EXPERTS + 31) / 32], mine = 0, total = 0;
        uint key[(EXPERTS + 31) / 32];
        int unordered = 0;
        #pragma unroll
        for (uint i = 0; i < (EXPERTS + 31) / 32; i++) {
            uint e = min(32 * i + lane, uint(EXPERTS - 1));
            score[i] = score_of(row[e]);
            float biased = score[i] + bias[e];
            key[i] = 32 * i + lane < EXPERTS ? key_of(biased) : 0u;
            if (biased != biased) unordered = 1;
        }
        for (uint k = 0; k < TOPK; k++) {
            uint best = 0, which = EXPERTS - 1;
            #pragma unroll
            for (uint i = 0; i < (EXPERTS + 31) / 32; i++) best = max(best, key[i]);
            best = simd_max(best);
            #pragma unroll
            for (uint i = 0; i < (EXPERTS + 31) / 32; i++)
                if (key[i] == best) which = min(which, 32 * i + lane);
            which = simd_min(which);
            #pragma unroll
            for (uint i = 0; i < (EXPERTS + 31) / 32; i++) {
                if (32 * i + lane != which) continue;
                key[i] = 0;
                total += score[i];
                if (k == slot) mine = score[i];
            }
            if (k == slot) expert = int(which);
        }
        float ratio = simd_sum(mine) / simd_sum(total);
        if (simd_max(unordered)) ratio = as_type<float>(0x7fc00000u);
"""

_LISTED = """
        int mine = listed[ids[job / TOPK] * TOPK + min(lane, uint(TOPK - 1))];
        float score = score_of(row[mine]);
        float total = simd_sum(lane < TOPK ? score : 0.0f);
        float ratio = simd_shuffle(score, ushort(slot)) / total;
        expert = simd_shuffle(mine, ushort(slot));
"""

_CHOICE = """
    threadgroup int expert_of_all[1];
    threadgroup float weight_of_all[1];
    const device T* activations = (const device T*)x + X_AT + (job / TOPK) * COLUMNS;
    device int* experts = (device int*)(hidden + threadgroups_per_grid.y * HIDDEN);
    if (simdgroup_index_in_threadgroup == 0) {
        uint slot = job %% TOPK;
        const device float* row = products + (job / TOPK) * ALL + LOGITS_AT;
        int expert = 0;
%s
        if (lane == 0) {
            expert_of_all[0] = expert;
            weight_of_all[0] = ratio * as_type<float>(SCALE);
            if (threadgroup_position_in_grid.x == 0) experts[job] = expert;
        }
    }
"""

_TAKEN = """
    int chosen = expert_of_all[0];
    float weight = weight_of_all[0];
"""


def _body(choice: str) -> str:
    parts = experts_up.DECLARED, _CHOICE % choice, experts_up.STAGING, _TAKEN
    return "".join((*parts, experts_up.LOADS, experts_up.PRODUCTS))


@lru_cache
def kernel(format: str, dtype: mx.Dtype, eight: bool, hashed: bool, inside: bool) -> Kernel:
    """The kernel for experts in a format, and activations of a type, or as bytes; perhaps `inside` others."""
    choice = ["listed", "ids"] if hashed else ["bias"]
    header = experts_up.header(format, dtype, eight, free=32) + router.HEADER
    inputs = ["x", "products", *choice, *experts_up.planes(format)]
    body = _body(_LISTED if hashed else _BEST)
    header += "" if hashed else KEY_OF
    name = _name(format, dtype, eight, hashed) + "_inside" * inside  # compared by itself
    return Kernel(name, inputs, ["hidden"], body, header)


def _name(format: str, dtype: mx.Dtype, eight: bool, hashed: bool) -> str:
    kind = "hashed" if hashed else "best"
    return f"routed_up_{format}_{staging.arithmetic(dtype, eight)}_{kind}"


class Options(TypedDict):
    """How experts are chosen and weighted, and what they multiply by; see `routed_up`."""

    scale: float
    topk: int
    limit: float
    bias: NotRequired[mx.array | None]
    table: NotRequired[mx.array | None]
    ids: NotRequired[mx.array | None]
    eight: NotRequired[bool]


def routed_up(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array | Inside,
    logits: Columns,
    **options: Unpack[Options],
) -> Routed:
    """weight * silu(min(gate . x, limit)) * clip(up . x) of a token's experts, and which these are.

    x (N, D), of one token perhaps inside the products' array; logits float32 (N, E): the router's products;
    planes of (E, H, D). A score is sqrt(softplus(logit)). With `bias` (E,) the experts are those of the
    highest score + bias, the best first; with `table` int32 (vocab, k) and `ids` int (N,) those listed for
    the token. Weights are scores over their sum, times scale, or all NaN where a NaN was compared. eight:
    as in `experts_up`. Hidden values are in x's type.
    """
    hashed, eight = options.get("table") is not None, options.get("eight", False)
    way = by_kernel if takes(format, x, logits, options["topk"], hashed, eight) else plain
    return way(format, gate, up, x, logits, **options)


def takes(
    format: str, x: mx.array | Inside, logits: Columns, topk: int, hashed: bool, eight: bool = False
) -> bool:
    """Whether the kernel multiplies tokens x (N, D) by experts in a format."""
    suits = format in experts.UP.formats and x.shape[1] % staging.CHUNK == 0
    suits = suits and topk <= dispatch.MOST_CHOSEN and logits.width <= router.MOST_EXPERTS
    suits = suits and x.shape[0] <= dispatch.FEW and x.dtype in (mx.bfloat16, mx.float32)
    name = _name(format, x.dtype, eight, hashed)
    return suits and dispatch.active(logits.array, name, dtype=x.dtype)


def plain(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array | Inside,
    logits: Columns,
    **options: Unpack[Options],
) -> Routed:
    """`routed_up` by MLX's own operations, which know no bytes."""
    listed = (options.get(name) for name in ("bias", "table", "ids"))
    sides = router.scores_of(logits.value), options["scale"], options["topk"], *listed
    chosen, weights = router.weighed(*sides, ordered=True)
    lift, rise = (lambda *each, m=m: FORMATS[format].gather(m, *each) for m in (gate, up))
    pairs = experts.Pairs(chosen, None, None)
    tokens = x.value if isinstance(x, Inside) else x
    hidden = experts.plain_up(lift, rise, tokens, pairs, weights, options["limit"])
    return routed(hidden, chosen)


def by_kernel(
    format: str,
    gate: Planes,
    up: Planes,
    x: mx.array | Inside,
    logits: Columns,
    **options: Unpack[Options],
) -> Routed:
    """`routed_up` in one launch; D is a multiple of 64, H even, k at most 32, E at most 1024."""
    count, hidden, topk = x.shape[0], gate["weight"].shape[-2], options["topk"]
    table, eight = options.get("table"), options.get("eight", False)
    named = ("bias",) if table is None else ("table", "ids")
    choice = [array for array in map(options.get, named) if isinstance(array, mx.array)]
    planes = experts_up.operands(format, gate, up, eight)
    cut = experts_up.cut(x, hidden, topk, format, options["limit"], eight)
    inside = isinstance(x, Inside)
    lying, at = (x.array, x.at) if isinstance(x, Inside) else (x, 0)
    cut["template"] += [
        ("X_AT", at),
        ("EXPERTS", logits.width),
        ("ALL", logits.array.shape[1]),
        ("LOGITS_AT", logits.begin),
        ("SCALE", bits(options["scale"])),
    ]
    size = count * topk * (hidden + number_size(x.dtype))
    (values,) = kernel(format, x.dtype, eight, table is not None, inside)(
        [lying, logits.array, *choice, *planes],
        [((size,), x.dtype)],
        **cut,
        reads=parts(experts_up.planes(format)[1:], count * topk, logits.width),
    )
    return Routed(values, count, topk)
