"""The router: scores, choice and weights of the experts; for a few tokens in one launch.

A threadgroup a token. Every SIMD-group scores experts; one then picks the best, k times over. A NaN
has no place in an order of scores: where there is one, all of the token's weights are NaN.
"""

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.codes.tables import bits
from ds4mlx.custom_kernels.dialect import Kernel, Shares
from ds4mlx.custom_kernels.words import LOAD8

GROUPS = 32  # SIMD-groups of a threadgroup
ROWS = 4  # experts a SIMD-group scores at a time
MOST_EXPERTS = 1024  # whose scores stay in threadgroup memory and registers

HEADER = """
// sqrt(log(1 + e^v)); log1p by the way that keeps its digits for a small argument.
inline float score_of(float v) {
  float u = exp(-fabs(v)), w = 1.0f + u;
  float log1p = w == 1.0f ? u : u * (log(w) / (w - 1.0f));
  return sqrt(max(v, 0.0f) + log1p);
}
"""

_SCORE = """
    uint lane = thread_index_in_simdgroup, token = threadgroup_position_in_grid.x;
    const device T* row = x + token * COLUMNS;
    for (uint e0 = simdgroup_index_in_threadgroup * ROWS; e0 < SCORED; e0 += GROUPS * ROWS) {
        float sum[ROWS] = {0};
        for (uint k = 8 * lane; k < COLUMNS; k += 256) {
            float a[8];
            load8(row + k, a);
            #pragma unroll
            for (uint r = 0; r < ROWS; r++) {
                float w[8];
                load8(weight + EXPERT(min(e0 + r, uint(SCORED - 1))) * COLUMNS + k, w);
                #pragma unroll
                for (uint i = 0; i < 8; i++) sum[r] = fma(a[i], w[i], sum[r]);
            }
        }
        #pragma unroll
        for (uint r = 0; r < ROWS; r++) {
            float v = simd_sum(sum[r]);
            if (lane == 0 && e0 + r < SCORED) scores[e0 + r] = score_of(v);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""

CHOOSE = (
    """
    threadgroup float scores[SCORED];
"""
    + _SCORE
    + """
    if (simdgroup_index_in_threadgroup > 0) return;
    float biased[(SCORED + 31) / 32];
    int unordered = 0;
    for (uint i = 0; i * 32 < SCORED; i++) {
        uint e = 32 * i + lane;
        biased[i] = e < SCORED ? scores[e] + bias[e] : -INFINITY;
        if (biased[i] != biased[i]) unordered = 1;
    }
    unordered = simd_max(unordered);
    float mine = 0, total = 0;
    uint chosen = 0;
    for (uint k = 0; k < TOPK; k++) {
        float best = -INFINITY;
        for (uint i = 0; i * 32 < SCORED; i++) best = max(best, biased[i]);
        best = simd_max(best);
        uint which = SCORED - 1;
        for (uint i = 0; i * 32 < SCORED; i++)
            if (biased[i] == best) which = min(which, 32 * i + lane);
        which = simd_min(which);
        for (uint i = 0; i * 32 < SCORED; i++)
            if (32 * i + lane == which) biased[i] = -INFINITY;
        float s = scores[which];
        total += s;
        if (lane == k) { mine = s; chosen = which; }
    }
    if (lane < TOPK) {
        experts[token * TOPK + lane] = int(chosen);
        float weight = mine / total * as_type<float>(SCALE);
        weights[token * TOPK + lane] = unordered ? as_type<float>(0x7fc00000u) : weight;
    }
"""
)

HASHED = (
    """
    threadgroup float scores[SCORED];
"""
    + _SCORE
    + """
    if (simdgroup_index_in_threadgroup > 0) return;
    float mine = scores[min(lane, uint(SCORED - 1))];
    float total = simd_sum(lane < SCORED ? mine : 0.0f);
    if (lane < SCORED) {
        experts[token * SCORED + lane] = EXPERT(lane);
        weights[token * SCORED + lane] = mine / total * as_type<float>(SCALE);
    }
"""
)


@lru_cache
def kernel(hashed: bool) -> Kernel:
    """The kernel that chooses by score and bias, or by token id."""
    if hashed:
        named = "#define EXPERT(i) table[ids[token] * SCORED + (i)]\n"
        inputs, body = ["x", "weight", "table", "ids"], HASHED
    else:
        named = "#define EXPERT(i) (i)\n"
        inputs, body = ["x", "weight", "bias"], CHOOSE
    name = "router_hashed" if hashed else "router"
    return Kernel(name, inputs, ["experts", "weights"], body, named + LOAD8 + HEADER)


def route(
    x: mx.array,
    weight: mx.array,
    scale: float,
    topk: int,
    *,
    bias: mx.array | None = None,
    table: mx.array | None = None,
    ids: mx.array | None = None,
    seen: Callable[[str, mx.array], mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Experts int (N, k) and their weights float32 (N, k) of tokens x (N, D).

    weight (E, D). With `bias` (E,) the experts of highest score + bias, in any order; with `table`
    int32 (vocab, k) and `ids` int (N,) those listed for the token. Weights are scores over their sum,
    times scale; a score is sqrt(softplus(weight . x)). A NaN among what is compared makes all weights
    of the token NaN. `seen` asks for the plain operations, and is given the logits, the scores and the
    choice (N, E) to go on from: what the best k are chosen by, which is score + bias; with a table it is
    k..1 for the experts listed, in their order, and less than 1 for others, the more the higher they score.
    """
    if seen is None and takes(x, weight, topk):
        return by_kernel(x, weight, scale, topk, bias=bias, table=table, ids=ids)
    return plain(x, weight, scale, topk, bias=bias, table=table, ids=ids, seen=seen)


def takes(x: mx.array, weight: mx.array, topk: int) -> bool:
    """Whether the kernel routes tokens x (N, D) among the rows of weight."""
    suits = x.shape[1] % 8 == 0 and topk <= dispatch.MOST_CHOSEN and len(weight) <= MOST_EXPERTS
    return suits and len(x) <= dispatch.FEW and dispatch.active(x, "router")


def plain(
    x: mx.array,
    weight: mx.array,
    scale: float,
    topk: int,
    *,
    bias: mx.array | None = None,
    table: mx.array | None = None,
    ids: mx.array | None = None,
    seen: Callable[[str, mx.array], mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """`route` by MLX's own operations."""
    if seen is None:
        return weighed(scores(x, weight), scale, topk, bias, table, ids)
    logits = seen("router.logits", logits_of(x, weight))
    each = seen("router.scores", scores_of(logits))
    choice = seen("router.choice", made := choice_of(each, bias, table, ids))
    if bias is not None:
        experts = best(choice, topk)
    else:
        experts = listed(table, ids) if choice is made else best_first(choice, topk)
    return experts, weights_of(each, experts, scale, None if bias is None else choice)


def weighed(
    scores: mx.array,
    scale: float,
    topk: int,
    bias: mx.array | None,
    table: mx.array | None,
    ids: mx.array | None,
    ordered: bool = False,
) -> tuple[mx.array, mx.array]:
    """What `route` gives, of the scores (N, E); `ordered`: with the best expert first."""
    if bias is None:
        experts = listed(table, ids)
    else:
        experts = in_order(scores, bias, topk) if ordered else choose(scores, bias, topk)
    return experts, weights_of(scores, experts, scale, None if bias is None else scores + bias)


def weights_of(
    scores: mx.array, experts: mx.array, scale: float, compared: mx.array | None
) -> mx.array:
    """Weights (N, k) of the experts; `compared` (N, E): what they were chosen by, if by anything."""
    weights = mx.take_along_axis(scores, experts, axis=-1)
    weights = weights / weights.sum(-1, keepdims=True) * scale
    if compared is None:
        return weights
    unordered = mx.isnan(compared).any(-1, keepdims=True)
    return mx.where(unordered, mx.nan, weights)


def listed(table: mx.array | None, ids: mx.array | None) -> mx.array:
    """The experts (N, k) that a table has for the ids (N,)."""
    assert table is not None and ids is not None
    return table[ids]


def choice_of(
    scores: mx.array, bias: mx.array | None, table: mx.array | None, ids: mx.array | None
) -> mx.array:
    """What the best experts are chosen by, float32 (N, E): see `route`."""
    if bias is not None:
        return scores + bias
    experts = listed(table, ids)
    named = experts[..., None] == mx.arange(scores.shape[-1])
    ranks = mx.arange(experts.shape[-1], 0, -1)[:, None]
    rank = mx.where(named, ranks, 0).max(1).astype(mx.float32)
    return mx.where(rank > 0, rank, 0.5 * scores / (1 + scores))


def scores(x: mx.array, weight: mx.array) -> mx.array:
    """sqrt(softplus(logit)) of every expert, float32 (N, E)."""
    return scores_of(logits_of(x, weight))


def logits_of(x: mx.array, weight: mx.array) -> mx.array:
    """weight . x of every expert, float32 (N, E)."""
    return x.astype(mx.float32) @ weight.astype(mx.float32).T


def scores_of(logits: mx.array) -> mx.array:
    """sqrt(softplus(logit)), float32."""
    return mx.sqrt(mx.logaddexp(logits, 0))


def choose(scores: mx.array, bias: mx.array, topk: int) -> mx.array:
    """The k experts with the highest score + bias; the bias moves the choice only."""
    return best(scores + bias, topk)


def best(choice: mx.array, topk: int) -> mx.array:
    """The k experts with the highest values (N, E), in any order; no gradient goes through them."""
    return mx.stop_gradient(mx.argpartition(-choice, topk - 1, axis=-1)[..., :topk])


def in_order(scores: mx.array, bias: mx.array, topk: int) -> mx.array:
    """The same with the best expert first."""
    return best_first(scores + bias, topk)


def best_first(choice: mx.array, topk: int) -> mx.array:
    """The k experts with the highest values (N, E), the best first; no gradient goes through them."""
    return mx.stop_gradient(mx.argsort(-choice, axis=-1)[..., :topk])


def by_kernel(
    x: mx.array,
    weight: mx.array,
    scale: float,
    topk: int,
    *,
    bias: mx.array | None = None,
    table: mx.array | None = None,
    ids: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`route` in one launch; the best expert comes first. D is a multiple of 8, k at most 32."""
    hashed = table is not None
    extra = [table, ids] if hashed else [bias]
    shape = (x.shape[0], topk)
    partly: Shares | None = None
    if table is not None:
        partly = lambda: {
            "weight": min(1.0, x.shape[0] * topk / len(weight)),
            "table": x.shape[0] / len(table),
        }
    experts, weights = kernel(hashed)(
        [x, weight, *(a for a in extra if a is not None)],
        [(shape, mx.int32), (shape, mx.float32)],
        groups=(x.shape[0], 1, 1),
        threads=32 * GROUPS,
        template=[
            ("T", x.dtype),
            ("COLUMNS", x.shape[1]),
            ("SCORED", topk if hashed else weight.shape[0]),
            ("TOPK", topk),
            ("ROWS", 1 if hashed else ROWS),
            ("GROUPS", GROUPS),
            ("SCALE", bits(scale)),
        ],
        reads=partly,
    )
    return experts, weights
