"""The index rows of the highest scores: a radix selection, without a sort.

A threadgroup selects among a slice of the rows, whose scores its threads keep in registers; where
there are several slices, a second launch selects among what they chose. A score becomes an integer of
the same order; its digits are counted from the highest down, until one digit's numbers fit exactly.
"""

from functools import lru_cache

import mlx.core as mx

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.words import CUDA_COUNTERS, METAL_COUNTERS

THREADS = 1024
EACH = 16  # scores of a thread

KEY_OF = """
// An integer of the same order, above 0; a NaN comes last.
inline uint key_of(float v) {
  uint u = as_type<uint>(v);
  return v != v ? 1u : u ^ (u >> 31 ? ~0u : 0x80000000u);
}
"""

HEADER = (
    KEY_OF
    + """
// The sum of what the threads before this one have; `totals` is of 32, and free afterwards.
inline uint sum_before(uint v, threadgroup uint* totals, uint lane, uint group) {
  uint sum = v;
  for (uint d = 1; d < 32; d *= 2) {
    uint other = simd_shuffle(sum, ushort(max(lane, d) - d));
    if (lane >= d) sum += other;
  }
  if (lane == 31) totals[group] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum += simd_sum(lane < group ? totals[lane] : 0u);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return sum - v;
}
"""
)

# What a launch selects among: all visible rows, or those that slices chose (-1, of key 0: none).
_FIRST = """
#define NUMBER(i) int(from + (i))
#define KEY(i) key_of(scores[token * many + from + (i)])
"""
_NEXT = """
#define NUMBER(i) chosen[token * many + from + (i)]
#define KEY(i) ordered[token * many + from + (i)]
"""

BODY = """
    threadgroup atomic_uint bins[2 * THREADS];
    threadgroup uint totals[32];
    threadgroup uint crossed[3];
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint id = thread_index_in_threadgroup, slice = threadgroup_position_in_grid.x;
    uint token = threadgroup_position_in_grid.y, many = MANY;
    uint from = slice * (EACH * THREADS), count = COUNT;
    count -= min(count, from);
    device int* best = rows + (token * threadgroups_per_grid.x + slice) * TOPK;
    device uint* best_keys = keys + (token * threadgroups_per_grid.x + slice) * TOPK;
    if (count <= TOPK) {
        for (uint i = id; i < TOPK; i += THREADS) {
            best[i] = i < count ? NUMBER(i) : -1;
            best_keys[i] = i < count ? KEY(i) : 0u;
        }
        return;
    }
    uint key[EACH] = {0};
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        if (i * THREADS >= count) break;
        if (i * THREADS + id < count) key[i] = KEY(i * THREADS + id);
    }
    uint prefix = 0, need = TOPK, shift = 32;
    #pragma unroll 1
    for (uint digit = 0; digit < 3; digit++) {
        uint above = shift, width = digit < 2 ? 11 : 10;
        shift -= width;
        clear(bins + id);
        clear(bins + THREADS + id);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (uint i = 0; i < EACH; i++) {
            if (i * THREADS >= count) break;
            if (key[i] != 0 && (digit == 0 || key[i] >> above == prefix))
                count_one(bins + (key[i] >> shift & ((1u << width) - 1)));
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint high = 2 * THREADS - 1 - 2 * id;  // the highest digits first
        uint a = counted(bins + high), b = counted(bins + high - 1);
        if (high == 1 && prefix == 0) b += TOPK;  // nothing, key 0, may be taken as often as need be
        uint before = sum_before(a + b, totals, lane, group);
        if (before < need && need <= before + a + b) {
            bool second = need > before + a;
            crossed[0] = second ? high - 1 : high;
            crossed[1] = need - before - (second ? a : 0u);
            crossed[2] = second ? b : a;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        prefix = (prefix << width) + crossed[0];
        need = crossed[1];
        if (need == crossed[2]) break;
    }
    uint mine = 0;  // how many are above, and 65536 times how many stand at the edge
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        if (i * THREADS >= count) break;
        mine += key[i] >> shift > prefix ? 1u : key[i] >> shift == prefix ? 65536u : 0u;
    }
    uint before = sum_before(mine, totals, lane, group);
    uint above = before & 65535u, edge = (before >> 16) + TOPK - need;
    #pragma unroll
    for (uint i = 0; i < EACH; i++) {
        if (i * THREADS >= count) break;
        uint top = key[i] >> shift, to = top > prefix ? above++ : top == prefix ? edge++ : TOPK;
        if (to < TOPK) {
            best[to] = key[i] != 0 ? NUMBER(i * THREADS + id) : -1;
            best_keys[to] = key[i];
        }
    }
"""


@lru_cache
def kernel(first: bool) -> Kernel:
    """The kernel that selects among all visible rows, or among chosen ones."""
    if first:
        name, inputs, header = "index_select", ["scores", "places"], _FIRST
        position = "(uint(places[OWN * 8 * token]) + (OWN ? 0 : token))"
        count, many = f"min(({position} + 1) / RATIO, many)", "uint(scores_shape[1])"
    else:
        name, inputs, header = "index_select_next", ["chosen", "ordered"], _NEXT
        count, many = "many", "uint(chosen_shape[1])"
    # in the body, where MLX looks for what it is to hand over
    body = BODY.replace("COUNT", count).replace("MANY", many)
    outputs, header = ["rows", "keys"], header + HEADER
    return Kernel(name, inputs, outputs, body, header, metal=METAL_COUNTERS, cuda=CUDA_COUNTERS)


def index_select(scores: mx.array, places: mx.array, *, topk: int, ratio: int = 4) -> mx.array:
    """The `topk` visible rows of the highest scores, int32 (S, topk), in any order; -1 where none is left.

    scores float32 (S, R). places int32 (S, 8), place[0] a token's position p: rows j < (p + 1) // ratio are
    visible, R at most; the other scores are not read. Among equal scores any are taken; NaN comes last.
    """
    if takes(scores, topk):
        return by_kernel(scores, places, topk, ratio)
    return plain(scores, places, topk, ratio)


def takes(scores: mx.array, topk: int) -> bool:
    """Whether the kernel selects among so many scores."""
    return (
        2 * topk <= EACH * THREADS and scores.size >= 8 and dispatch.active(scores, "index_select")
    )


def by_kernel(
    scores: mx.array, places: mx.array, topk: int, ratio: int, each: int = EACH
) -> mx.array:
    """`index_select` in one launch, or in one more for every factor of each * 1024 / topk rows.

    Takes one place int32 (8,) too: that of the first of S tokens that follow on one another.
    """
    tokens, many = scores.shape
    slices, among = -(-many // (each * THREADS)), [scores, places]
    template = [("THREADS", THREADS), ("EACH", each), ("TOPK", topk), ("RATIO", ratio)]
    first = True
    while True:
        among = kernel(first)(
            among,
            [((tokens, slices * topk), type) for type in (mx.int32, mx.uint32)],
            groups=(slices, tokens, 1),
            threads=THREADS,
            template=[*template, *([("OWN", places.ndim - 1)] if first else [])],
            reads=(lambda: _read(scores, places, ratio)) if first else None,
        )
        if slices == 1:
            return among[0]
        slices, first = -(-among[0].shape[1] // (each * THREADS)), False


def _read(scores: mx.array, places: mx.array, ratio: int) -> dict[str, float]:
    """The share of the scores that is read, at most."""
    following = len(scores) if places.ndim == 1 else 1
    last = int(places.reshape(-1, 8)[:, 0].max()) + following
    return {"scores": min(1.0, last // ratio / scores.shape[1])}


def plain(scores: mx.array, places: mx.array, topk: int, ratio: int) -> mx.array:
    """`index_select` by MLX's own operations."""
    visible = (places[:, :1] + 1) // ratio
    masked = mx.where(mx.arange(scores.shape[1]) < visible, scores, -mx.inf)
    least = min(topk, scores.shape[1])
    chosen = mx.argpartition(-masked, least - 1, axis=-1)[:, :least].astype(mx.int32)
    chosen = mx.where(chosen < visible, chosen, -1)
    return mx.pad(chosen, [(0, 0), (0, topk - least)], constant_values=-1)
