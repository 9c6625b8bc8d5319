"""The model's own roundings against exact decimal arithmetic on the codes."""

import mlx.core as mx
import numpy as np
import pytest
import v4format
from hypothesis import given, settings
from hypothesis import strategies as st
from refmodel import fake_fp4, fake_fp8, hadamard

from ds4mlx.state.rounding import (
    nearest_e2m1,
    power_of_two_at_least,
    round_fp4,
    round_fp8,
    round_index,
)

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def test_power_of_two_at_least_around_every_power():
    exact = np.ldexp(np.float32(1), np.arange(-120, 120)).astype(np.float32)
    above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
    for values, want in ((exact, exact), (above, exact * 2), (below, exact)):
        assert np.array_equal(np.array(power_of_two_at_least(mx.array(values))), want)


def test_e2m1_ties_go_to_the_even_code():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 6.0: 6}
    x = mx.array(list(ties))
    assert nearest_e2m1(x).tolist() == list(ties.values())
    assert nearest_e2m1(-x).tolist() == [-v for v in ties.values()]


def test_e2m1_is_the_nearest_value_everywhere():
    x = np.linspace(-6, 6, 100_001).astype(np.float32)
    want = v4format.E2M1[v4format.encode_e2m1(x)]
    assert np.array_equal(np.array(nearest_e2m1(mx.array(x))), want)


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=64, max_size=64), st.sampled_from([1e-30, 1e-4, 1.0, 1e5]))
def test_fp8_and_fp4_round_trips(values, size):
    x = (np.array(values, np.float32) * np.float32(size)).reshape(1, 64)
    assert np.array_equal(np.array(round_fp8(mx.array(x))), fake_fp8(x.astype(np.float64), 64))
    if np.abs(x).max() > 1e-37:
        assert np.array_equal(np.array(round_fp4(mx.array(x))), fake_fp4(x.astype(np.float64)))


@pytest.mark.parametrize("function", [round_fp8, round_fp4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rounding_twice_changes_nothing(function, dtype):
    x = mx.random.normal((50, 128), key=mx.random.key(1)).astype(dtype)
    once = function(x)
    assert once.dtype == dtype and bool((function(once) == once).all())


def test_a_ragged_last_group_is_a_group():
    x = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    x[:, 64:] *= 100
    got = np.array(round_fp8(mx.array(x)))
    assert np.array_equal(got[:, :64], fake_fp8(x[:, :64].astype(np.float64), 64))
    assert np.array_equal(got[:, 64:], fake_fp8(x[:, 64:].astype(np.float64), 32))


def test_index_rounding_rotates_first():
    rows = np.random.default_rng(0).normal(size=(6, 128))
    got = np.array(round_index(mx.array(rows.astype(np.float32)), "official"))
    want = fake_fp4(hadamard(rows.astype(np.float32)).astype(np.float64))
    assert (got != want).mean() < 0.01  # a float32 rotation may fall on the other side of a tie
    assert np.abs(got - want).max() <= 0.5
