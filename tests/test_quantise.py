"""The quantisers: against ggml's on the same matrices, and what must hold for any matrix."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DATA
from safetensors import safe_open

from ds4mlx import DataError
from ds4mlx.convert import dequantize, quantise, quantise_iq2, quantise_k, quantize
from ds4mlx.formats import FORMATS

REFERENCE = DATA / "quant" / "reference.safetensors"
TYPES = ("IQ2_XXS", "Q2_K", "Q4_K")
K_FORMATS = {
    "Q2_K": (quantise_k.Q2_K, quantise_k.q2_k_planes),
    "Q4_K": (quantise_k.Q4_K, quantise_k.q4_k_planes),
}
DTYPES = {"U32": np.uint32, "U8": np.uint8, "F16": np.float16}


def reference():
    with safe_open(REFERENCE, "np") as file:
        errors = json.loads(file.metadata()["relative_weighted_squared_error"])
        return {name: file.get_tensor(name) for name in file.keys()}, errors  # noqa: SIM118


ARRAYS, ERRORS = reference()
MATRICES = sorted({name.partition(".")[0] for name in ERRORS})


def lost(w, got, importance) -> float:
    """Weighted squared error relative to the weights."""
    w, got = w.astype(np.float64), got.astype(np.float64)
    return float((importance * (got - w) ** 2).sum() / (importance * w * w).sum())


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_no_worse_than_ggml(matrix, type):
    """Never more of the weighted error than the C quantiser leaves."""
    w, importance = ARRAYS[f"{matrix}.w"], ARRAYS[f"{matrix}.importance"]
    want = ERRORS[f"{matrix}.{type.lower()}"]
    assert lost(w, dequantize(quantize(w, type, importance)), importance) <= want


@pytest.mark.parametrize("type", [*TYPES, "Q8_0"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_ggmls_blocks_have_the_error_it_states(matrix, type):
    blocks = ARRAYS[f"{matrix}.{type.lower()}"]
    got = dequantize(blocks, type)
    error = lost(ARRAYS[f"{matrix}.w"], got, ARRAYS[f"{matrix}.importance"])
    assert error == pytest.approx(ERRORS[f"{matrix}.{type.lower()}"], rel=1e-4)


def some(rows=5, columns=512, seed=0):
    rng = np.random.default_rng(seed)
    importance = rng.random(columns, np.float32) ** 4
    return rng.standard_normal((rows, columns), np.float32), importance


def searched(x, type):
    """The values that a search settles on for blocks (N, 256), and the planes it stores."""
    if type == "IQ2_XXS":
        minus, groups = quantise_iq2.prepare(x, mx.ones_like(x))
        d, level, points = quantise_iq2.settled(groups, quantise_iq2.best_scale(groups))
        signs = mx.where(minus, -1, 1)
        scale = mx.repeat((d * (2 * level + 1)).reshape(-1), 4)[:, None]
        values = (scale * quantise_iq2.grid_levels()[points] * signs).reshape(x.shape)
        return values, quantise_iq2.stored(minus, d, level, points)
    shape, planes = K_FORMATS[type]
    levels = quantise_k.quantise_k(x, None, shape)
    return levels.decoded().transpose(2, 1, 0).reshape(x.shape), planes(levels)


@pytest.mark.parametrize("type", TYPES)
def test_what_the_search_works_with_can_be_stored(type):
    """Its points are the format's own: the stored planes decode to the very values it chose."""
    x = mx.array(some(40, 256)[0])
    values, planes = searched(x, type)
    got = np.array(FORMATS[type.lower()].decode(planes))
    np.testing.assert_allclose(got, np.array(values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_storable_matrices_survive(size):
    """Whatever points of IQ2_XXS a block has, the search finds them again."""
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**32, (8, 16), dtype=np.uint64).astype(np.uint32)
    words[:, 1::2] |= np.uint32(15 << 28)
    planes = {"weight": words, "d": np.full((8, 1), size, np.float16)}
    w = quantise.decode("iq2_xxs", planes)
    got = dequantize(quantize(w, "IQ2_XXS", np.ones(256)))
    assert lost(w, got, np.ones(256)) < 1e-6


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("columns", [256, 2048])
def test_planes_are_those_of_the_format(type, columns):
    w, importance = some(3, columns)
    planes, layout = quantize(w, type, importance).planes, FORMATS[type.lower()].layout
    assert {p: a.dtype for p, a in planes.items()} == {p: DTYPES[t] for p, (t, _) in layout.items()}
    widths = FORMATS[type.lower()].widths(columns)
    assert {p: a.shape for p, a in planes.items()} == {p: (3, n) for p, n in widths.items()}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("steered", [True, False])
def test_blocks_do_not_see_each_other(type, steered, monkeypatch):
    """The same whatever is quantised with them; IQ2_XXS without importance needs whole matrices."""
    w, importance = some()
    importance = importance if steered else (w * w).sum(0) if type == "IQ2_XXS" else None
    whole = dequantize(quantize(w, type, importance))
    rows = [dequantize(quantize(row[None], type, importance)) for row in w]
    assert np.array_equal(whole, np.concatenate(rows))
    monkeypatch.setattr(quantise, "CPU_BATCH", 3)
    monkeypatch.setattr(quantise, "GPU_BATCH", 3)
    assert np.array_equal(whole, dequantize(quantize(w, type, importance)))


def test_iq2_without_importance_takes_the_columns_energy():
    w, _ = some()
    energy = (w * w).sum(0)
    assert np.array_equal(
        dequantize(quantize(w, "IQ2_XXS")), dequantize(quantize(w, "IQ2_XXS", energy))
    )


@pytest.mark.parametrize("type", TYPES)
def test_blocks_without_any_importance_are_not_lost(type):
    """Importance 0 over a whole block, or all of them, does not turn weights into zeros."""
    w, importance = some(2)
    even = np.ones_like(importance)
    importance[256:] = 0
    got = dequantize(quantize(w, type, importance))
    assert np.array_equal(got[:, 256:], dequantize(quantize(w[:, 256:], type, even[256:])))
    nothing = quantize(w, type, np.zeros_like(importance))
    assert np.array_equal(dequantize(nothing), dequantize(quantize(w, type, even)))


@pytest.mark.parametrize("type", TYPES)
def test_importance_helps_what_is_important(type):
    """Less weighted error than without it, though more of the plain one."""
    w, importance = some(16)
    steered = lost(w, dequantize(quantize(w, type, importance)), importance)
    assert steered < lost(w, dequantize(quantize(w, type)), importance)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("importance", [None, 0.0, 1e-30, 1e30])
def test_zeros_stay_zeros(type, importance):
    columns = None if importance is None else np.full(256, importance, np.float32)
    got = dequantize(quantize(np.zeros((2, 256)), type, columns))
    assert not got.any() and got.shape == (2, 256)


@pytest.mark.parametrize("type", TYPES)
def test_unimportant_columns_harm_nobody(type):
    """Zero everywhere, or but for one column, and half of the columns."""
    w, importance = some(4)
    importance[::2] = 0
    only = np.zeros_like(importance)
    only[7] = 1
    for columns in (np.zeros_like(importance), only, importance):
        got = dequantize(quantize(w, type, columns))
        assert np.isfinite(got).all() and np.abs(got).max() < 20
    assert lost(w, dequantize(quantize(w, type, importance)), importance) < 0.15


SHAPES = {
    "constant": lambda rng: np.full(256, rng.normal()),
    "negative": lambda rng: -rng.random(256) - 0.5,
    "one outlier": lambda rng: np.where(np.arange(256) == 77, 1e4, rng.normal(size=256)),
    "one value": lambda rng: np.where(np.arange(256) == 3, -2.5, 0),
    "large": lambda rng: 1e5 * rng.normal(size=256),
    "steps": lambda rng: rng.integers(-3, 4, 256).astype(float),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steered", [True, False])
def test_odd_blocks(type, shape, steered):
    """IQ2_XXS has no zero, so that what is beside a single large value gets a little of it."""
    rng = np.random.default_rng(0)
    w = np.stack([SHAPES[shape](rng) for _ in range(3)]).astype(np.float32)
    importance = rng.random(256).astype(np.float32) if steered else np.ones(256)
    got = dequantize(quantize(w, type, importance if steered else None))
    limit = 0.2 if type != "IQ2_XXS" else 5 if shape.startswith("one") else 0.5
    assert np.isfinite(got).all() and lost(w, got, importance) < limit


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("size", [1e-5, 1e-8, 1e-20, 1e-38, 1e-45])
def test_tiny_values(type, size):
    """Below what half-precision scales reach they become zero, never something larger."""
    w, importance = some(2)
    got = dequantize(quantize(w * np.float32(size), type, importance))
    assert np.isfinite(got).all() and np.abs(got).max() <= max(20 * size, 1e-6)


@settings(max_examples=20)
@given(st.sampled_from(TYPES), st.integers(0, 2**31), st.floats(-4, 3))
def test_any_matrix(type, seed, power):
    """The error does not depend on the size of the values, and repeats."""
    w, importance = some(2, seed=seed)
    w = w * np.float32(10**power)
    got = dequantize(quantize(w, type, importance))
    limit = {"IQ2_XXS": 0.16, "Q2_K": 0.1, "Q4_K": 0.01}[type]
    assert lost(w, got, importance) < limit
    assert np.array_equal(got, dequantize(quantize(w, type, importance)))


BAD = {
    "no quantiser for Q3_K": (np.zeros((1, 256)), "Q3_K", None),
    "a multiple of 256": (np.zeros((1, 255)), "Q2_K", None),
    "a multiple of 256 values": (np.zeros(256), "Q4_K", None),
    "rows of a multiple": (np.zeros((0, 256)), "IQ2_XXS", None),
    "not all finite": (np.full((1, 256), np.nan), "Q2_K", None),
    "are not all finite": (np.full((1, 256), -np.inf), "IQ2_XXS", None),
    "importance must be 256 finite": (np.zeros((1, 256)), "Q2_K", np.zeros(255)),
    "values of at least 0": (np.zeros((1, 256)), "Q2_K", np.full(256, -1.0)),
    "of at least 0": (np.zeros((1, 256)), "Q4_K", np.full(256, np.nan)),
    "finite values of at least 0": (np.ones((1, 256)), "Q4_K", np.full(256, np.inf)),
    "too large for q4_k": (np.full((1, 256), 1e9), "Q4_K", np.ones(256)),
    "too large for iq2_xxs": (np.full((1, 256), 1e9), "IQ2_XXS", np.ones(256)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    with pytest.raises(DataError, match=message) as refused:
        quantize(*BAD[message])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("exponent", [-140, -126, -60, -2, 2, 60, 120, 126])
def test_only_ratios_of_importances_matter(type, exponent):
    """The same bytes from importances 4^k times as large, up to float32's largest and smallest."""
    w, importance = some(3)
    importance = np.maximum(importance, 2.0**-8)  # so that the least stays a number of 24 bits
    if exponent < -126 + 8:
        importance = np.exp2(np.round(np.log2(importance)))  # these are exact below that too
    want = quantize(w, type, importance).planes
    got = quantize(w, type, np.ldexp(importance, exponent).astype(np.float32)).planes
    assert all(np.array_equal(want[plane], got[plane]) for plane in want)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 1e35, 3e38])
@pytest.mark.parametrize("kind", ["random", "equal", "one", "two ends"])
def test_extreme_importances_give_a_usable_matrix(type, size, kind):
    w, importance = some(3)
    chosen = {"equal": np.ones_like(importance), "one": np.arange(512) == 7}.get(kind, importance)
    importance = (chosen * np.float64(size)).astype(np.float32)
    if kind == "two ends":
        importance[::2] = 1e-45
    got = dequantize(quantize(w, type, importance))
    assert np.isfinite(got).all()
    alive = np.linalg.norm(got[:, importance > 0]) / np.linalg.norm(w[:, importance > 0])
    assert alive > 0.3
