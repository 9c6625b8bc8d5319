"""The searches for stored points: equal to their references, alone and inside error feedback."""

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
from ds4mlx.custom_kernels.codes import iq2_feedback, iq2_nearest

searched, changed = partial(cases.searched, 67), partial(cases.changed, 67)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("iq2_searched", searched, "odd << weakest", "odd"),
    ("iq2_searched", searched, "fma(b.w, u[7], cost)", "fma(b.w, u[6], cost)"),
    ("iq2_searched", searched, "sizes + j, 4", "sizes, 4"),
    ("iq2_searched", searched, "k = 8 * j + 8; k < 32", "k = 8 * j + 9; k < 32"),
    ("iq2_searched", searched, "- float(LEVELS / 2)", "- float(LEVELS / 2 - 3)"),
    ("iq2_searched", searched, "i / 64 * 8 + i % 8]", "i % 8]"),
    ("iq2_searched", searched, "costs[i] < costs[best]", "costs[i] > costs[best]"),
    ("iq2_searched", searched, f"costs[own] = cost;\n    {BARRIER}", "costs[own] = cost;"),
    ("iq2_searched", searched, "row < uint(d_shape[0])", "true"),
    ("iq2_changed", changed, "if (cost < 0)", "if (true)"),
    ("iq2_changed", changed, "better ? code : codes[j]", "code"),
    ("iq2_changed", changed, "0.5f * sum - slope[8 * j + c]", "sum - slope[8 * j + c]"),
    ("iq2_changed", changed, "parts[64 * j + 8 * i + c]", "parts[8 * i + c]"),
    ("iq2_changed", changed, "c = 8 * j + 8; c < 32", "c = 8 * j + 12; c < 32"),
    ("iq2_changed", changed, "near = level[row];", ""),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        searched()
        changed()
    assert check(*dict(handed).values()) == []


def test_all_that_is_stored_has_an_even_number_of_minuses():
    x, w = mx.random.normal((500, 1, 8), key=mx.random.key(4)), mx.ones((1, 8))
    codes, values = iq2_nearest.nearest_points(x, mx.ones((500,)), w)
    signs = np.array(iq2_nearest.signs_of(codes))
    assert not (signs.sum(-1) % 2).any() and np.array_equal(signs, np.array(values) < 0)
    levels = np.array(iq2_nearest.grid_levels())[np.array(codes) & 255]
    assert np.array_equal(np.abs(values), levels)


def test_odd_values_are_stored_as_by_the_reference():
    """Zeros of either sign, values of any size, and scales of 0 or almost 0."""
    x = np.random.default_rng(6).standard_normal((9, 32)).astype(np.float32)
    x[0], x[1], x[2, 3] = 0.0, -0.0, -0.0
    x[3, 1], x[4, 2], x[5, 4] = 1e18, -1e18, 1e-30
    d = mx.array([1, 1, 1, 1, 1, 1, 0, 1e-45, np.inf], mx.float32)
    _, root, inverse = cases.moment(2)
    for factors in ((root, inverse), (mx.eye(32), mx.eye(32))):
        want, error = iq2_feedback.searched_plain(mx.array(x), d, *factors)
        with on_metal():
            got, off = iq2_feedback.searched_by_kernel(mx.array(x), d, *factors)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(off, error, rtol=1e-5, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("search", [searched, changed])
def test_what_a_group_is_stored_as_is_stored(search):
    """Values are those of the codes to the bit, whatever moved."""
    with on_metal():
        got = search()
    level, points, values = (pair[0] for pair in got[:3])
    points, scale = np.array(points).astype(np.uint32), np.array(2 * level + 1)
    levels = np.array(iq2_nearest.grid_levels())[points & 255].reshape(-1, 32)
    minus = points[..., None] >> np.arange(8, 16) & 1
    signed = np.where(minus.reshape(-1, 32), -levels, levels) * scale
    share = np.array(values) / signed  # the scale d of a row
    np.testing.assert_allclose(share, np.broadcast_to(share[:, :1], share.shape), rtol=1e-6)


def test_feedback_by_kernel():
    """The same bytes but for choices that rounding decides."""
    w = mx.random.normal((6, 256), key=mx.random.key(5))
    moment = Moment.of(correlated(256))
    want, lost = quantise_fed(w, "iq2_xxs", moment)
    with on_metal(), dispatch.kernels():
        got, loss = quantise_fed(w, "iq2_xxs", moment)
    assert np.mean(got["weight"] != want["weight"]) < 0.05
    assert loss.weighted == pytest.approx(lost.weighted, rel=0.01)
