"""Rotary tables and rotation."""

import math

import mlx.core as mx
import numpy as np
import pytest

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.layer.plain import rotate
from ds4mlx.model.batch import Batch, row_positions
from ds4mlx.model.rope import Rotary, frequencies, rotary_tables, step_angles
from ds4mlx.state.step import Step

FLASH = ModelConfig()


def test_yarn_divides_the_slow_pairs_and_leaves_the_fast_ones():
    """Flash's numbers: pairs 0..15 keep their frequency, pairs 25..31 are divided by 16."""
    plain = np.array([160000.0 ** (-2 * i / 64) for i in range(32)])
    ratio = frequencies(FLASH, True) / plain
    assert np.allclose(ratio[:16], 1, rtol=1e-6) and np.allclose(ratio[25:], 1 / 16, rtol=1e-6)
    assert (np.diff(ratio[15:26]) < 0).all()


def test_window_layers_have_no_yarn():
    want = [10000.0 ** (-2 * i / 64) for i in range(32)]
    assert np.allclose(frequencies(FLASH, False), want, rtol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 65535, 1_048_575])
def test_angles_are_float32_products_with_full_range_reduction(position):
    cos, sin = (np.array(a)[0] for a in Rotary(FLASH, True).angles(np.array([position])))
    for i, f in enumerate(frequencies(FLASH, True)):
        angle = float(np.float32(np.float32(position) * f))
        assert abs(cos[i] - math.cos(angle)) < 1e-7 and abs(sin[i] - math.sin(angle)) < 1e-7


def test_angles_of_steps_are_those_of_tokens_and_rows():
    """Of a token in both kinds of layers, and of the rows of ratio 4 and 128 to which it belongs."""
    tables, positions = rotary_tables(FLASH), [0, 31, 32, 4095, 65_536, 1_048_575]
    alone = [step_angles(tables, [position])[0] for position in positions]
    for position, got in zip(
        [*positions, *positions], [*step_angles(tables, positions), *alone], strict=True
    ):
        places = position, position, position // 4 * 4, position // 128 * 128
        for ratio, place, angles in zip((0, 4, 4, 128), places, got, strict=True):
            want = tables[ratio].angles(np.array([place]))
            assert np.array_equal(angles, [np.array(each)[0] for each in want])


def test_rotation_is_interleaved_on_the_last_channels_and_undone_by_its_inverse():
    x = np.random.default_rng(0).normal(size=(3, 4, 72)).astype(np.float32)
    angles = Rotary(FLASH, False).angles(np.arange(5, 8))
    got = np.array(rotate(mx.array(x), angles))
    assert np.array_equal(got[..., :8], x[..., :8])
    turned = (x[..., 8::2] + 1j * x[..., 9::2]) * np.exp(
        1j * np.multiply.outer(np.arange(5, 8), frequencies(FLASH, False)).astype(np.float32)
    )[:, None]
    assert np.abs(got[..., 8::2] - turned.real).max() < 1e-6
    assert np.abs(got[..., 9::2] - turned.imag).max() < 1e-6
    back = rotate(mx.array(got), angles, inverse=True)
    assert np.abs(np.array(back) - x).max() < 1e-6


def test_compressed_rows_step_by_their_ratio():
    """Row j to token ratio * j, those rows that a step from 6 to 29 tokens completes."""
    assert row_positions(Step(6, 23), 4).tolist() == [4, 8, 12, 16, 20, 24]
    assert row_positions(Step(6, 1), 4).tolist() == []
    assert row_positions(Step(120, 140), 128).tolist() == [0, 128]
    batch = Batch.of(mx.arange(23), [Step(6, 23)], rotary_tables(FLASH))
    table = Rotary(FLASH, True).angles(np.arange(30))
    for rows, tokens, every in zip(batch.spans[0].rows[4], batch.angles[4], table, strict=True):
        assert bool((rows == every[4:28:4]).all()) and bool((tokens == every[6:29]).all())
