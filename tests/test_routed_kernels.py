"""The routed experts' launches of a step: equal to plain operations, and to the router's choice."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from spoiling import assert_caught, assert_two_each, executor_only, fault_ids, on_metal

from ds4mlx import ModelConfig
from ds4mlx.custom_kernels.cases import routed as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer import router
from ds4mlx.custom_kernels.products import routed_down, routed_up
from ds4mlx.custom_kernels.products.columns import side_by_side, whole
from ds4mlx.custom_kernels.products.routed import routed
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.model.moe import MoE

F32, BF16 = mx.float32, mx.bfloat16


@pytest.mark.parametrize("place", ["logits", "bias"])
def test_a_nan_among_the_scores_spoils_its_own_token(place):
    planes = [random_planes("q4_k", (9, 5, 256), seed) for seed in (1, 2)]
    logits, bias = np.array(normal((2, 9), F32, 3)), np.array(normal((9,), F32, 4))
    if place == "logits":
        logits[1, 3] = np.nan
    else:
        bias[3] = np.nan
    options = {"scale": 1.0, "topk": 2, "limit": 10.0, "bias": mx.array(bias)}
    x = normal((2, 256), F32, 5)
    with on_metal():
        got = routed_up.by_kernel("q4_k", *planes, x, whole(mx.array(logits)), **options)
    experts = got.chosen
    spoilt = np.isnan(np.array(got.hidden)).reshape(2, -1).all(axis=1)
    assert spoilt.tolist() == ([False, True] if place == "logits" else [True, True])
    assert ((np.array(experts) >= 0) & (np.array(experts) < 9)).all()


def test_equal_scores_choose_the_lowest_experts():
    planes = [random_planes("q4_k", (9, 5, 256), seed) for seed in (1, 2)]
    options = {"scale": 1.0, "topk": 3, "limit": 10.0, "bias": mx.zeros((9,))}
    x, logits = normal((1, 256), F32, 5), mx.array([[0.0, 1, 1, 0, 1, 1, 0, 0, 0]])
    with on_metal():
        got = routed_up.by_kernel("q4_k", *planes, x, whole(logits), **options)
    assert got.chosen.tolist() == [[1, 2, 4]]
    weights = router.weighed(router.scores_of(logits), 1.0, 3, mx.zeros((9,)), None, None)[1]
    assert mx.allclose(weights, mx.full((1, 3), 1 / 3))


CONFIG = ModelConfig(
    hidden_size=256,
    moe_intermediate_size=256,
    n_routed_experts=8,
    num_experts_per_tok=3,
    vocab_size=40,
    num_hash_layers=1,
    swiglu_limit=0.7,
)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("block", [0, 1], ids=["hashed", "by score"])
def test_without_kernels_they_are_the_modules(dtype, block):
    moe = MoE(CONFIG, block)
    stacks, shared = moe.experts, moe.shared_experts
    for seed, (stack, format) in enumerate(
        [
            (stacks.w1, "iq2_xxs"),
            (stacks.w3, "iq2_xxs"),
            (stacks.w2, "q2_k"),
            (shared.w1, "mxfp8"),
            (shared.w2, "mxfp8"),
            (shared.w3, "mxfp8"),
        ]
    ):
        stack.store(format)
        for plane, array in random_planes(format, stack._shape, seed).items():
            stack[plane] = array
    moe.gate.weight = normal((8, 256), BF16, 7, 0.1)
    x, ids = normal((3, 256), dtype, 8), mx.array([3, 30, 17])
    if moe.gate.hashed:
        table = np.stack([np.random.default_rng(i).permutation(8)[:3] for i in range(40)])
        moe.gate.tid2eid = mx.array(table.astype(np.int32))
        by = {"table": moe.gate.tid2eid, "ids": ids}
    else:
        moe.gate.bias = normal((8,), F32, 9)
        by = {"bias": moe.gate.bias}
    want = moe(x, ids)
    logits = x.astype(F32) @ moe.gate.weight.astype(F32).T
    scale, limit = CONFIG.routed_scaling_factor, CONFIG.swiglu_limit
    values = routed_up.routed_up(
        *("iq2_xxs", stacks.w1.planes, stacks.w3.planes, x, whole(logits)),
        **by,
        scale=scale,
        topk=3,
        limit=limit,
    )
    gates, ups = (whole(w(x).astype(F32)) for w in (shared.w1, shared.w3))
    own = routed_down.Shared("mxfp8", shared.w2.planes, gates, ups, limit)
    sums = routed_down.routed_down("q2_k", stacks.w2.planes, values, own, dtype=dtype)
    got = (sums[0] + sums[1].astype(dtype).astype(F32)).astype(dtype)
    bound = 1e-5 if dtype == F32 else 1e-2  # the sum over experts goes another way round
    np.testing.assert_allclose(
        np.array(got.astype(F32)), np.array(want.astype(F32)), rtol=bound, atol=bound
    )


def up_of(logits, bias=None, by=None, x=None):
    """Hidden values and experts of 3 tokens by the kernel and without it."""
    planes = [random_planes("mxfp4", (40, 5, 64), seed) for seed in (1, 2)]
    x = normal((3, 64), F32, 3) if x is None else x
    sides = "mxfp4", *planes, x, whole(logits)
    options = {"scale": 1.5, "topk": 6, "limit": 7.0, **(by or {"bias": bias})}
    with on_metal():
        both = routed_up.by_kernel(*sides, **options), routed_up.plain(*sides, **options)
        return [(np.array(each.hidden), np.array(each.chosen)) for each in both]


@executor_only
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("where", ["logits", "bias"])
def test_nan_among_what_is_compared(where, value):
    """A NaN spoils all weights of its tokens; so does an infinite score that is chosen, its own."""
    sides = {"logits": normal((3, 40), F32, 5), "bias": normal((40,), F32, 6)}
    if where == "logits":
        sides[where][1, 33] = value
    else:
        sides[where][33] = value
    (got, chosen), (want, _) = up_of(**sides)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert chosen.min() >= 0 and chosen.max() < 40
    assert all(len(set(row)) == 6 for row in chosen.tolist())
    if np.isnan(value):
        rows = np.isnan(got).reshape(3, -1).all(1)
        assert rows.tolist() == ([False, True, False] if where == "logits" else [True] * 3)


@executor_only
def test_nan_of_one_token_or_of_an_expert_not_listed():
    table = mx.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]])
    by = {"table": table.astype(mx.int32), "ids": mx.array([2, 0, 1])}
    logits = normal((3, 40), F32, 5)
    logits[0, 3] = mx.nan  # not listed for the token
    logits[2, 8] = mx.nan
    (got, chosen), (want, listed) = up_of(logits, by=by)
    assert np.array_equal(chosen, listed)
    assert np.isnan(got).reshape(3, -1).all(1).tolist() == [False, False, True]
    assert np.array_equal(np.isnan(got), np.isnan(want))


@executor_only
@pytest.mark.parametrize("which", ["hidden", "gates", "ups"])
def test_nan_reaches_its_own_sum_alone(which):
    planes = random_planes("q2_k", (4, 5, 256), 1)
    shared = random_planes("mxfp8", (5, 64), 2)
    hidden, products = normal((6, 256), F32, 3), normal((3, 128), F32, 4)
    array, column = {"hidden": (hidden, 40), "gates": (products, 40), "ups": (products, 104)}[which]
    array[2, column] = mx.nan  # of token 1, or of token 2
    experts = mx.array([[0, 1], [1, 2], [2, 3]], mx.int32)
    with on_metal():
        sums, dense = routed_down.by_kernel(
            *("q2_k", planes, routed(hidden, experts)),
            routed_down.Shared("mxfp8", shared, *side_by_side(products, [64, 64]), 7.0),
            dtype=F32,
        )
    spoilt = [np.isnan(np.array(a)).all(1).tolist() for a in (sums, dense)]
    none = [False] * 3
    assert spoilt == (
        [[False, True, False], none] if which == "hidden" else [none, [*none[:2], True]]
    )
    assert np.isnan(np.array(sums)).sum() + np.isnan(np.array(dense)).sum() == 5


up = partial(cases.up, "iq2_xxs", F32, 37, 21, 256, 2, 6)
inside = partial(cases.up, "iq2_xxs", BF16, 37, 21, 256, 1, 6, inside=True)
hashed = partial(cases.up, "q4_k", F32, 37, 21, 256, 2, 6, True)
down = partial(cases.down, "q2_k", F32, "mxfp8", (5, 256, 320, 37), 3, 3)
tall = partial(cases.up, "iq2_xxs", F32, 37, 53, 256, 2, 6)
spans = partial(cases.down, "mxfp4", F32, "mxfp8", (5, 256, 1184, 37), 8, 2)
FAULTS = [
    ("routed_up_iq2_xxs", up, "score_of(row[e]);", "row[e];"),
    ("routed_up_iq2_xxs", up, "if (k == slot) mine = score[i];", "mine = score[i];"),
    ("routed_up_iq2_xxs", up, "+ bias[e]", ""),
    ("routed_up_iq2_xxs", up, "key[i] = 0;", ""),
    ("routed_up_iq2_xxs", tall, "row0 += ROWS", "row0 += 1"),
    ("routed_up_iq2_xxs", tall, "ahead ? lane :", "ahead ? last :"),
    ("routed_up_iq2_xxs", inside, "+ X_AT", ""),
    ("routed_down_q2_k", down, "(hidden + tokens * TOPK * COLUMNS)", "(hidden + TOPK * COLUMNS)"),
    ("routed_up_q4_k", hashed, "ids[job / TOPK]", "ids[0]"),
    ("routed_up_q4_k", hashed, "lane < TOPK ? score", "lane <= TOPK ? score"),
    ("routed_down_q2_k", down, "hidden_of<T>(g.y, u.y, limit)", "hidden_of<T>(g.y, u.x, limit)"),
    ("routed_down_q2_k", down, "t * ALL + UPS_AT", "t * ALL + GATES_AT"),
    ("routed_up_q4_k", hashed, "* ALL + LOGITS_AT", "* EXPERTS"),
    ("routed_down_q2_k", down, "shared[(t) * WIDTH + (row)]", "shared[row]"),
    ("routed_down_q2_k", down, "part %= PARTS;", ""),
    ("routed_down_q2_k", down, "token = part / PARTS", "token = 0"),
    ("routed_down_q2_k", down, "j % quads) * pieces + j / quads", "j % quads) * pieces"),
    ("routed_down_mxfp4", spans, "uint k = c - base /", "uint k = c - 0 *"),
    ("routed_down_mxfp4", spans, "if (base) threadgroup", "if (0) threadgroup"),
    ("routed_down_mxfp4", spans, "by[r] = by1[r];", ""),
    ("routed_down_q2_k", down, "part -= PARTS * tokens;", "part -= PARTS;"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)
