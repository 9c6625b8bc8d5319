"""Rounding with error feedback: what it gains, what it stores, and inputs that it must bear."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from moments import correlated

from ds4mlx import DataError
from ds4mlx.convert.feedback import DAMPING, Moment, descend, first_pass
from ds4mlx.convert.quantise import decode, quantise
from ds4mlx.convert.quantise_fed import quantise_fed, quantise_stack
from ds4mlx.convert.quantise_k import Q2_K, Q4_K
from ds4mlx.convert.rounding_iq2 import IQ2Rounding
from ds4mlx.convert.rounding_k import KRounding

BENCHMARK = Path(__file__).parents[1] / "benchmarks/flash_feedback.py"
TYPES = ("iq2_xxs", "q2_k", "q4_k")
ROWS, COLUMNS = 24, 512


@pytest.fixture(scope="module")
def sums():
    return correlated(COLUMNS)


@pytest.fixture(scope="module")
def moment(sums):
    return Moment.of(sums)


def matrix(seed=0, rows=ROWS, columns=COLUMNS):
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def fed(w, moment, format="iq2_xxs"):
    planes, loss = quantise_fed(mx.array(w), format, moment)
    return planes, decode(format, planes), loss


def outputs_lost(w, got, sums) -> float:
    """The mean square error of the outputs relative to them, in float64."""
    gap, w, h = got.astype(np.float64) - w, w.astype(np.float64), sums.astype(np.float64)
    return float(np.einsum("ri,ij,rj", gap, h, gap) / np.einsum("ri,ij,rj", w, h, w))


def test_factors_are_those_of_the_moments(sums, moment):
    h = sums.astype(np.float64) * (COLUMNS / np.trace(sums.astype(np.float64)))
    h = (h + h.T) / 2 + DAMPING * np.eye(COLUMNS)
    places = (moment.order[:, None] * 32 + np.arange(32)).ravel()
    root, inverse = np.array(moment.root, np.float64), np.array(moment.inverse, np.float64)
    np.testing.assert_allclose(root @ root.T, h[np.ix_(places, places)], atol=1e-4)
    np.testing.assert_allclose(root @ inverse, np.eye(COLUMNS), atol=1e-3)
    assert not np.tril(root, -1).any() and not np.abs(np.tril(inverse, -1)).max() > 1e-6
    energy = np.diag(h).reshape(-1, 32).sum(-1)[moment.order]
    assert (np.diff(energy) <= 0).all()


@pytest.mark.parametrize("type", TYPES)
def test_outputs_lose_less_than_half(sums, moment, type):
    """Than with the diagonal as importances, where the inputs go together."""
    w = matrix()
    plain, _ = quantise(mx.array(w), type, np.diag(sums))
    _, got, loss = fed(w, moment, type)
    error = outputs_lost(w, got, sums)
    assert error < 0.5 * outputs_lost(w, decode(type, plain), sums)
    assert loss.weighted**2 == pytest.approx(error, rel=1e-2)


def rounding(type, w, moment):
    if type == "iq2_xxs":
        return IQ2Rounding(w, moment)
    return KRounding(w, moment, {"q2_k": Q2_K, "q4_k": Q4_K}[type])


@pytest.mark.parametrize("type", TYPES)
def test_every_step_helps(sums, moment, type):
    """The first pass, and the descent from it, whose gradient stays exact."""
    w = mx.array(matrix(1, 8))
    h, exact = np.array(moment.h, np.float64), np.array(w, np.float64)
    rows = rounding(type, w, moment)
    first_pass(w, rows, moment)
    before = outputs_lost(exact, values_of(rows), h)
    gradient = descend(w, rows, moment)
    np.testing.assert_allclose(gradient, (exact - values_of(rows)) @ h, atol=3e-3)
    assert outputs_lost(exact, values_of(rows), h) < 0.97 * before
    _, got, _ = fed(np.array(w), moment, type)
    np.testing.assert_allclose(values_of(rows), got, rtol=1e-5, atol=1e-6)


def values_of(rows):
    return np.concatenate([np.array(rows.values(block)) for block in range(COLUMNS // 256)], -1)


def test_inputs_that_do_not_go_together():
    """Nothing to make good: about as well as without feedback."""
    w, even = matrix(2), np.eye(COLUMNS, dtype=np.float32)
    today, _ = quantise(mx.array(w), "iq2_xxs", np.ones(COLUMNS, np.float32))
    _, got, _ = fed(w, Moment.of(even))
    assert outputs_lost(w, got, even) < 1.03 * outputs_lost(w, decode("iq2_xxs", today), even)


def test_others_read_the_same_values(moment):
    """As GGUF blocks, through the `gguf` package."""
    planes, got, _ = fed(matrix(3), moment)
    d = planes["d"].reshape(-1, 1).view(np.uint8)
    codes = planes["weight"].reshape(len(d), 16).view(np.uint8)
    blocks = np.concatenate([d, codes], -1).reshape(ROWS, -1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.IQ2_XXS)
    assert np.array_equal(theirs, got)


@pytest.mark.parametrize("type", TYPES)
def test_a_stack_has_the_bytes_of_its_matrices(moment, type):
    stack = mx.array(np.stack([matrix(seed, 8) for seed in range(3)]))
    for (planes, loss), values in zip(quantise_stack(stack, type, moment), stack, strict=True):
        alone, lost = quantise_fed(values, type, moment)
        assert loss == lost and planes.keys() == alone.keys()
        assert all(np.array_equal(planes[plane], alone[plane]) for plane in planes)


def test_only_ratios_of_moments_matter_and_it_repeats(sums, moment):
    w = matrix(4, 4)
    want = fed(w, moment)[0]
    for again in (moment, Moment.of(sums * np.float32(2.0**40)), Moment.of(sums * 2.0**-90)):
        got = fed(w, again)[0]
        assert all(np.array_equal(want[plane], got[plane]) for plane in want)


def test_the_error_does_not_depend_on_the_size_of_the_values(sums, moment):
    w = matrix(5, 4)
    for size in (1e-3, 1, 1e3):
        _, got, _ = fed(w * np.float32(size), moment)
        assert outputs_lost(w * np.float32(size), got, sums) < 0.06


ODD = {
    "zeros": lambda w: 0 * w,
    "a block of zeros": lambda w: np.where(np.arange(COLUMNS) < 256, 0, w),
    "one value": lambda w: np.where(np.arange(COLUMNS) == 3, w, 0),
    "one outlier": lambda w: np.where(np.arange(COLUMNS) == 77, 1e3, w),
    "equal": lambda w: np.ones_like(w),
    "tiny": lambda w: w * np.float32(1e-30),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("kind", ODD)
def test_odd_matrices(moment, kind, type):
    w = ODD[kind](matrix(6, 2)).astype(np.float32)
    _, got, _ = fed(w, moment, type)
    assert np.isfinite(got).all()
    assert np.abs(got[:, :256]).max() <= 10 * np.abs(w).max()


def test_moments_of_few_inputs_or_of_one_column():
    """Less than full rank, down to a single column that is ever used."""
    few = correlated(COLUMNS, rows=5)
    one = np.zeros((COLUMNS, COLUMNS), np.float32)
    one[9, 9] = 1e20
    w = matrix(7, 3)
    for sums in (few, one):
        _, got, _ = fed(w, Moment.of(sums))
        assert np.isfinite(got).all() and np.linalg.norm(got) > 0.3 * np.linalg.norm(w)


@pytest.mark.parametrize("sums", [np.zeros((256, 256)), -np.eye(256), np.eye(256) - 0.9])
def test_what_is_no_matrix_of_moments(sums):
    with pytest.raises(np.linalg.LinAlgError):
        Moment.of(sums.astype(np.float32))


def test_values_that_half_precision_cannot_scale(moment):
    with pytest.raises(DataError, match="too large for iq2_xxs"):
        fed(np.full((1, COLUMNS), 1e9, np.float32), moment)


def test_a_short_form_of_the_benchmark(tmp_path):
    """benchmarks/flash_feedback.py, whose own sizes are those of Flash."""
    sizes = {"rows": 256, "columns": 256, "tokens": 2000, "stack": 2, "stacks": 1, "seconds": 100}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, BENCHMARK, *options, "--results", tmp_path / "kept"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "kept").read_text())
    assert json.loads(done.stdout) == figures
    assert figures["a layer"]["matrices of gate and up measured"] == 2
    assert figures["projected minutes of all layers"] > 0
    for what in ("the sample", "all inputs"):
        error = figures[f"error of the outputs over {what}"]
        assert error["with feedback"] < 0.5 * error["by importance"]
