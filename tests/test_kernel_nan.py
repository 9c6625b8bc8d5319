"""No kernel makes a number of a NaN: where the plain operations give NaN, the kernels do."""

import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metalsim import metal_kernel

from ds4mlx.custom_kernels import dialect
from ds4mlx.custom_kernels.cases import modules as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.codes import staging
from ds4mlx.custom_kernels.layer import hyper_before, hyper_post, hyper_pre, router
from ds4mlx.custom_kernels.products import (
    experts,
    experts_down,
    experts_down_sorted,
    experts_fragments,
    experts_up,
    experts_up_sorted,
    swiglu,
)
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.formats import FORMATS

F32, BF16 = mx.float32, mx.bfloat16
LIMIT = 0.7
EXPERTS, ROWS, COLUMNS = 3, 6, 256


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """Kernels run as on a Mac."""
    if sys.platform != "darwin":
        monkeypatch.setattr(dialect, "target", lambda: "metal")
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)


def spoilt(x: mx.array, value: float, *at: int) -> mx.array:
    """x with one of its values replaced."""
    values = np.array(x.astype(F32))
    values[at] = value
    return mx.array(values).astype(x.dtype)


def nan_for_nan(got: mx.array, want: mx.array) -> None:
    """Both are NaN at the same places, somewhere and not everywhere; numbers elsewhere agree."""
    a, b = (np.array(x.astype(F32)) for x in (got, want))
    assert np.array_equal(np.isnan(a), np.isnan(b))
    assert np.isnan(b).any() and not np.isnan(b).all()
    np.testing.assert_allclose(a, b, rtol=3e-2, atol=3e-2)


def no_number_of_a_nan(got: mx.array, want: mx.array) -> None:
    """Where the plain result is NaN, so is the kernel's; an infinity may become NaN earlier in it."""
    a, b = (np.array(x.astype(F32)) for x in (got, want))
    assert not (np.isfinite(a) & np.isnan(b)).any()
    both = np.isfinite(a) & np.isfinite(b)
    np.testing.assert_allclose(a[both], b[both], rtol=3e-2, atol=3e-2)


CHOSEN = mx.array([[0, 1], [1, 2], [2, 0]])
WEIGHTS = mx.array([[0.25, 0.75], [0.5, 0.5], [1, 0.125]])


def up_operands(stored: str, dtype: mx.Dtype) -> dict:
    sizes = EXPERTS, ROWS, COLUMNS
    return {
        "gate": random_planes(stored, sizes, 1),
        "up": random_planes(stored, sizes, 2),
        "x": normal((3, COLUMNS), dtype, 4),
        "experts": CHOSEN,
        "weights": WEIGHTS,
        "limit": LIMIT,
    }


def run_up(stored: str, ordered: bool, operands: dict) -> tuple[mx.array, mx.array]:
    """Gate and up by a kernel, and by plain operations, token by token."""
    want = experts_up.reference(FORMATS[stored], **operands)
    if not ordered:
        return experts_up.experts_up(stored, **operands), want
    tall = experts.tall(operands["x"].dtype, CHOSEN.size, EXPERTS)
    order, jobs = cases.sorted_pairs(CHOSEN, EXPERTS, tall)
    sides = {name: side for name, side in operands.items() if name != "experts"}
    sides |= {"order": order, "jobs": jobs}
    if operands["x"].dtype == F32:
        got = experts_up_sorted.experts_up_sorted(stored, **sides)
    else:
        got = experts_fragments.experts_up_fragments(stored, **sides, tall=tall)
    return got, want[order]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("stored", ["iq2_xxs", "mxfp4"])
def test_activations_of_gate_and_up(stored, ordered, dtype):
    for value in (mx.nan, mx.inf, -mx.inf):
        operands = up_operands(stored, dtype)
        operands["x"] = spoilt(operands["x"], value, 1, 7)
        compare = nan_for_nan if np.isnan(value) else no_number_of_a_nan
        compare(*run_up(stored, ordered, operands))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("matrix", ["gate", "up"])
def test_scales_of_gate_and_up(matrix, ordered):
    """One row of one expert has no scale: of each token of that expert one value is NaN."""
    operands = up_operands("q4_k", F32)
    planes = operands[matrix]
    operands[matrix] = {**planes, "d": spoilt(planes["d"], mx.nan, 1, 3, 0)}
    got, want = run_up("q4_k", ordered, operands)
    nan_for_nan(got, want)
    assert np.isnan(np.array(got)).sum() == 2


@pytest.mark.parametrize("ordered", [False, True])
def test_weights_of_the_experts(ordered):
    operands = up_operands("mxfp4", F32)
    operands["weights"] = spoilt(WEIGHTS, mx.nan, 2, 0)
    nan_for_nan(*run_up("mxfp4", ordered, operands))


@pytest.mark.parametrize("stored", ["iq2_xxs", "q4_k"])
@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_activations_as_bytes(stored, value):
    operands = up_operands(stored, F32)
    operands["x"] = spoilt(operands["x"], value, 1, 40)
    got = experts_up.experts_up(stored, **operands, eight=True)
    operands["x"] = staging.as_bytes(operands["x"])
    nan_for_nan(got, experts_up.reference(FORMATS[stored], **operands))


@pytest.mark.parametrize("stored", ["q2_k", "mxfp4"])
@pytest.mark.parametrize("way", ["few", "sorted", "fragments", "bytes"])
def test_hidden_values_of_down(stored, way):
    if way == "bytes" and stored == "mxfp4":
        pytest.skip("MXFP4 has no product of bytes")
    planes = random_planes(stored, (EXPERTS, ROWS, COLUMNS), 1)
    dtype = BF16 if way == "fragments" else F32
    hidden = spoilt(normal((6, COLUMNS), dtype, 4), mx.nan, 3, 200)
    want = experts_down.reference(FORMATS[stored], planes, hidden, CHOSEN)
    if way in ("sorted", "fragments"):
        tall = experts.tall(dtype, CHOSEN.size, EXPERTS)
        order, jobs = cases.sorted_pairs(CHOSEN, EXPERTS, tall)
        sides = hidden[order], order, jobs, 2
        if way == "sorted":
            got = experts_down_sorted.experts_down_sorted(stored, planes, *sides)
        else:
            got = experts_fragments.experts_down_fragments(stored, planes, *sides, tall)
    else:
        got = experts_down.experts_down(stored, planes, hidden, CHOSEN, way == "bytes")
        if way == "bytes":
            rounded = staging.as_bytes(hidden)
            want = experts_down.reference(FORMATS[stored], planes, rounded, CHOSEN)
    nan_for_nan(got, want)


ROUTES = {
    "a token": ("x", (1, 3)),
    "an expert's row": ("weight", (5, 0)),
    "a bias": ("bias", (5,)),
}


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
@pytest.mark.parametrize("where", ROUTES)
def test_router(where, value):
    """Whatever is compared with a NaN: no choice made in spite of it goes unseen."""
    sides = {
        "x": normal((3, 64), F32, 1),
        "weight": normal((40, 64), F32, 2, 0.2),
        "bias": normal((40,), F32, 3),
    }
    name, at = ROUTES[where]
    sides[name] = spoilt(sides[name], value, *at)
    x, weight, bias = sides.values()
    weights = [way(x, weight, 1.5, 6, bias=bias)[1] for way in (router.by_kernel, router.plain)]
    found = [np.isnan(np.array(each)).all(1).tolist() for each in weights]
    assert found[0] == found[1]
    if np.isnan(value):
        assert found[0] == ([False, True, False] if where == "a token" else [True] * 3)


def test_hashed_router():
    x = spoilt(normal((3, 64), F32, 1), mx.nan, 1, 3)
    weight, table = normal((8, 64), F32, 2), mx.array([[0, 1], [2, 3], [4, 5]], mx.int32)
    sides = x, weight, 1.5, 2
    options = {"table": table, "ids": mx.arange(3)}
    ways = router.by_kernel, router.plain
    nan_for_nan(*(way(*sides, **options)[1] for way in ways))
    # An expert that is not listed for the token is not compared.
    spoiled = x[:1], spoilt(weight, mx.nan, 7, 0), 1.5, 2
    assert all(mx.isfinite(way(*spoiled, **options)[1]).all() for way in ways)


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_hyper_connection(value):
    width = 64
    weights = (
        normal((hyper_pre.MIXES, 4 * width), F32, 1, 0.1),
        normal((24,), F32, 2),
        normal((3,), F32, 3),
        1 + normal((width,), F32, 8, 0.3),
    )
    streams = spoilt(normal((2, 4, width), F32, 4), value, 1, 2, 5)
    options = {"iterations": 3, "eps": 1e-6, "norm_eps": 1e-6}
    ways = hyper_before.by_kernel, hyper_pre.plain
    for got, want in zip(*(way(streams, *weights, **options) for way in ways), strict=True):
        nan_for_nan(got, want)
    out, post = normal((2, width), F32, 5), normal((2, 4), F32, 6)
    comb = normal((2, 4, 4), F32, 7)
    got, want = (w(streams, out, post, comb) for w in (hyper_post.by_kernel, hyper_post.plain))
    no_number_of_a_nan(got, want)
    no_number_of_a_nan(want, got)


@pytest.mark.parametrize("gate, up", [(mx.nan, 1.0), (1.0, mx.nan), (-mx.inf, 1.0)])
def test_plain_swiglu(gate, up):
    assert mx.isnan(swiglu.swiglu(mx.array(gate), mx.array(up), LIMIT)).item()
    limits = map(partial(swiglu.swiglu, limit=LIMIT), (mx.array(9.0),) * 2, mx.array([9.0, -9.0]))
    assert all(mx.isfinite(each).item() for each in limits)
