"""The routed experts' launches of a step: equal to plain operations, and to the router's choice."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metalsim import options_of
from spoiling import assert_caught, assert_two_each, executor_only, fault_ids, on_metal

from ds4mlx.custom_kernels.cases import routed as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE, normal
from ds4mlx.custom_kernels.layer import router
from ds4mlx.custom_kernels.products import routed_up
from ds4mlx.custom_kernels.random_weights import random_planes

F32 = mx.float32


def named(listed):
    return [pytest.param(c, id=f"{c.name}, {str(c.dtype).rpartition('.')[2]}") for c in listed]


@pytest.mark.parametrize("case", named(cases.small()))
def test_small(case):
    with on_metal(), options_of(checked=True):
        assert case.error() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", named(cases.wide()))
def test_wide(case):
    with on_metal():
        assert case.error() <= TOLERANCE[case.dtype]


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
        hidden, experts = routed_up.by_kernel("q4_k", *planes, x, mx.array(logits), **options)
    spoilt = np.isnan(np.array(hidden)).reshape(2, -1).all(axis=1)
    assert spoilt.tolist() == ([False, True] if place == "logits" else [True, True])
    assert ((np.array(experts) >= 0) & (np.array(experts) < 9)).all()


def test_equal_scores_choose_the_lowest_experts():
    planes = [random_planes("q4_k", (9, 5, 256), seed) for seed in (1, 2)]
    options = {"scale": 1.0, "topk": 3, "limit": 10.0, "bias": mx.zeros((9,))}
    x, logits = normal((1, 256), F32, 5), mx.array([[0.0, 1, 1, 0, 1, 1, 0, 0, 0]])
    with on_metal():
        _, experts = routed_up.by_kernel("q4_k", *planes, x, logits, **options)
    assert experts.tolist() == [[1, 2, 4]]
    weights = router.weighed(router.scores_of(logits), 1.0, 3, mx.zeros((9,)), None, None)[1]
    assert mx.allclose(weights, mx.full((1, 3), 1 / 3))


up = partial(cases.up, "iq2_xxs", F32, 37, 21, 256, 2, 6)
hashed = partial(cases.up, "q4_k", F32, 37, 21, 256, 2, 6, True)
down = partial(cases.down, "q2_k", F32, "mxfp8", (5, 256, 320, 37), 3, 3)
FAULTS = [
    ("routed_up_iq2_xxs", up, "score_of(row[e]);", "row[e];"),
    ("routed_up_iq2_xxs", up, "if (k == slot) mine = score[i];", "mine = score[i];"),
    ("routed_up_iq2_xxs", up, "+ bias[e]", ""),
    ("routed_up_q4_k", hashed, "ids[job / TOPK]", "ids[0]"),
    ("routed_up_q4_k", hashed, "lane < TOPK ? score", "lane <= TOPK ? score"),
    ("routed_down_q2_k", down, "hidden_of<T>(g.y, u.y, limit)", "hidden_of<T>(g.y, u.x, limit)"),
    ("routed_down_q2_k", down, "shared[t * WIDTH + row0 + r]", "shared[row0 + r]"),
    ("routed_down_q2_k", down, "part -= PARTS * TOKENS;", "part -= PARTS;"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)
