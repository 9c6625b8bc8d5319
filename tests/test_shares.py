"""Shares of a probability on the device, against float64, and the bounds that are promised."""

import math

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.engine.sampling import Sampler, draw_key
from ds4mlx.engine.shares import ONE, before_share, halvings, limit, weights


def distances(row, coldness):
    logits = mx.array(row)[None]
    return halvings(logits, mx.max(logits, axis=-1, keepdims=True), coldness)


@pytest.mark.parametrize("coldness", [1.0, 1 / 0.6, 1 / 1.7, 1 / 3, 40.0, 1e-3, 1e-30])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 8.0])
def test_distances_and_weights_are_those_of_float64(coldness, spread):
    row = np.random.default_rng(2).normal(0, spread, 129_280).astype(np.float32)
    want = (row.max() - row.astype(np.float64)) * coldness / math.log(2)
    got = np.array(distances(row, coldness))[0]
    near = want < 700
    assert np.abs(got / 2**ONE - want)[near].max() < 2e-13 * max(1, want[near].max())
    assert (got[~near] >= 700 << ONE).all()
    units = np.array(weights(mx.array(got), 45))
    assert np.abs(units - np.exp2(45 - want)).max() < 9  # 2**-42 of the largest
    tail = np.exp2(45 - want) < 2**40
    assert np.abs(units - np.exp2(45 - want))[tail].max(initial=0) < 2
    assert abs(units.sum() - np.exp2(45 - want).sum()) < 1e-10 * units.sum()


@pytest.mark.parametrize("largest", [0.0, 1e-30, 3.0, 3e38, -3e38])
def test_whatever_is_far_away_has_no_weight(largest):
    row = np.array([largest, -np.inf, -3.4e38], np.float32)
    for coldness in (1e-30, 1.0, 1e30):
        got = distances(np.append(row, row[0]), coldness)
        units = weights(got, 45)[0].tolist()
        assert units[0] == units[3] == 1 << 45 and units[1] == 0
        assert (got[0, :1] <= limit(1.0)).item() and (got[0] <= limit(0.0)).all().item()


def test_every_share_of_equals_is_reached_by_as_many():
    """k of n equals reach k / n, though few such fractions have exact binary digits."""
    for equals in (3, 7, 10, 49, 1000):
        zeros = mx.zeros((1, equals), mx.int64)
        for part in range(1, equals + 1, max(1, equals // 97)):
            assert before_share(zeros, part / equals).sum().item() == part
            assert before_share(zeros, part / equals + 1e-12).sum().item() == min(part + 1, equals)
    many = mx.zeros((1, 129_280), mx.int64)
    for part in (1, 2, 3, 40_009, 129_279):
        assert before_share(many, part / 129_280).sum().item() == part


@pytest.mark.parametrize("equals", [131_071, 131_072, 300_000])
def test_larger_vocabularies_do_not_overflow(equals):
    assert before_share(mx.zeros((1, equals), mx.int64), 0.5).sum().item() == -(-equals // 2)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_p": 0.9, "min_p": 0.2}]
)
def test_a_draw_reads_nothing_before_it_is_read(options):
    """Tracing gives it arrays that have no values yet."""
    sampler, key = Sampler(**options), draw_key(1, 2)
    logits = mx.array(np.random.default_rng(1).normal(0, 2, (3, 50)).astype(np.float32))
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda row: mx.array(row.tolist()))(logits)
    traced = mx.compile(lambda row: sampler(row, key))
    assert traced(logits).shape == sampler(logits, key).shape  # what is traced is not run
