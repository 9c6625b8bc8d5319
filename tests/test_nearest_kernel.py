"""The search for stored points: equal to its reference, alone and inside error feedback."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metalsim import check
from moments import correlated
from spoiling import (
    assert_caught,
    assert_two_each,
    executor_only,
    fault_ids,
    handed_to_metal,
    on_metal,
)

from ds4mlx.convert.feedback import Moment
from ds4mlx.convert.quantise_fed import quantise_fed
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import searches as cases
from ds4mlx.custom_kernels.codes import iq2_nearest

nearest = partial(cases.nearest, 21, 4)
FAULTS = [
    ("iq2_nearest", nearest, "odd << weakest", "odd"),
    ("iq2_nearest", nearest, "at % PLACES", "0"),
    ("iq2_nearest", nearest, "scale[at / PLACES]", "scale[0]"),
    ("iq2_nearest", nearest, "fma(b.w, v[7], cost)", "fma(b.w, v[6], cost)"),
    ("iq2_nearest", nearest, "(mem_flags::mem_threadgroup);", "(mem_flags::mem_none);"),
    ("iq2_nearest", nearest, "if (at >= uint(x_shape[0])) return;", ""),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_it_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        nearest()
    assert check(*dict(handed).values()) == []


def test_all_that_is_stored_has_an_even_number_of_minuses():
    x, w = mx.random.normal((500, 1, 8), key=mx.random.key(4)), mx.ones((1, 8))
    codes, values = iq2_nearest.nearest_points(x, mx.ones((500,)), w)
    signs = np.array(iq2_nearest.signs_of(codes))
    assert not (signs.sum(-1) % 2).any() and np.array_equal(signs, np.array(values) < 0)
    levels = np.array(iq2_nearest.grid_levels())[np.array(codes) & 255]
    assert np.array_equal(np.abs(values), levels)


def test_odd_values_are_stored_as_by_the_reference():
    """Zeros of either sign, weights of 0, values of any size, and scales of 0 or almost 0."""
    x = np.random.default_rng(6).standard_normal((9, 1, 8)).astype(np.float32)
    x[0], x[1], x[2, 0, 3] = 0.0, -0.0, -0.0
    x[3, 0, 1], x[4, 0, 2], x[5, 0, 4] = 1e18, -1e18, 1e-30
    scale = mx.array([1, 1, 1, 1, 1, 1, 0, 1e-45, np.inf], mx.float32)
    for w in (mx.ones((1, 8)), mx.zeros((1, 8))):
        want = iq2_nearest.plain(mx.array(x), scale, w)
        with on_metal():
            got = iq2_nearest.by_kernel(mx.array(x), scale, w)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_feedback_by_kernel():
    """The same bytes but for choices that rounding decides."""
    w = mx.random.normal((6, 256), key=mx.random.key(5))
    moment = Moment.of(correlated(256))
    want, lost = quantise_fed(w, "iq2_xxs", moment)
    with on_metal(), dispatch.kernels():
        got, loss = quantise_fed(w, "iq2_xxs", moment)
    assert np.mean(got["weight"] != want["weight"]) < 0.05
    assert loss.weighted == pytest.approx(lost.weighted, rel=0.01)
