"""Products with a few rows of activations by the kernel, run on the CPU executor or on a Mac."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metalsim import check, options_of
from spoiling import (
    assert_caught,
    assert_two_each,
    executor_only,
    fault_ids,
    handed_to_metal,
    named,
    on_metal,
)

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import dense_matvec as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE, normal
from ds4mlx.custom_kernels.products import dense_matvec
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.custom_kernels.recording import recording

F32, BF16 = mx.float32, mx.bfloat16


@pytest.fixture(autouse=True)
def metal():
    with on_metal(), dispatch.kernels():
        yield


@pytest.fixture
def tiled(monkeypatch):
    """Matrix units are used on Metal too, for any number of rows of bfloat16."""
    monkeypatch.setitem(dense_matvec.TILED_FROM, "metal", 1)


@pytest.mark.parametrize("case", named(cases.tiles()))
def test_tiles(case, tiled):
    with options_of(checked=True):
        assert case.error() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_stays_where_it_belongs(kind, dtype):
    """In the results of one row of activations, or of one row of the matrix; in idle lanes nowhere."""
    planes, x = random_planes(kind, (7, 96), 1), np.array(normal((3, 96), F32, 2))
    x[1, 95] = np.nan
    got = dense_matvec.by_kernel([(kind, planes)], mx.array(x).astype(dtype))
    assert np.isnan(np.array(got)).tolist() == [[row == 1] * 7 for row in range(3)]
    plane = {"mxfp8": "scales", "q8_0": "d"}.get(kind, "weight")
    spoilt = np.array(planes[plane].astype(F32))
    spoilt[4, -1] = 255 if kind == "mxfp8" else np.nan
    planes = {**planes, plane: mx.array(spoilt).astype(planes[plane].dtype)}
    got = dense_matvec.by_kernel([(kind, planes)], normal((3, 96), dtype, 2))
    assert np.isnan(np.array(got)).tolist() == [[row == 4 for row in range(7)]] * 3


@pytest.mark.parametrize("kind", ["mxfp8", "q8_0", "bf16"])
def test_nan_stays_where_it_belongs_in_tiles(kind, tiled):
    planes, x = random_planes(kind, (19, 128), 1), np.array(normal((3, 128), F32, 2))
    x[1, 95] = np.nan
    got = dense_matvec.by_kernel([(kind, planes)], mx.array(x).astype(BF16))
    assert np.isnan(np.array(got)).tolist() == [[row == 1] * 19 for row in range(3)]


@pytest.mark.parametrize(
    "kinds, dtype, shape, name",
    [
        (["mxfp8", "bf16"], BF16, (5, 128), "dense_tiles_mxfp8"),
        (["mxfp8", "bf16"], BF16, (2, 128), "dense_matvec_mxfp8"),
        (["mxfp8", "bf16"], BF16, (5, 96), "dense_matvec_mxfp8"),
        (["mxfp8", "f16"], BF16, (5, 128), "dense_matvec_mxfp8"),
        (["mxfp8", "bf16"], F32, (5, 128), "dense_matvec_mxfp8"),
    ],
)
def test_which_kernel_multiplies(kinds, dtype, shape, name):
    """The one that was asked about, too."""
    matrices = [(kind, random_planes(kind, (3, shape[1]), 1)) for kind in kinds]
    with recording("cuda") as launches, dispatch.asking() as asked:
        dense_matvec.dense_matvec(matrices, mx.zeros(shape, dtype))
    (launch,) = launches
    assert launch.name == f"{name}_{kinds[1]}"
    assert {kernel for kernel, _ in asked} == {name, name.replace("mxfp8", kinds[1])}


@pytest.mark.parametrize(
    "inside, outside",
    [
        ((["mxfp8"], (8, 96)), (["mxfp8"], (9, 96))),
        ((["bf16"], (1, 8)), (["bf16"], (1, 12))),
        ((["f32"], (1, 12)), (["f32", "bf16"], (1, 12))),
        ((["q8_0", "f16"], (2, 3, 64)), (["q8_0", "q4_k"], (2, 3, 256))),
    ],
)
def test_what_the_kernel_takes(inside, outside):
    def fits(formats, shape):
        return dense_matvec.fits(formats, mx.zeros(shape))

    assert fits(*inside) and not fits(*outside)


def test_both_ways_through_one_function():
    matrices = [(kind, random_planes(kind, (6, 64), 1)) for kind in ("mxfp8", "f16")]
    x = normal((3, 2, 64), BF16, 2)
    kernel = dense_matvec.dense_matvec(matrices, x, BF16)
    with dispatch.plain_operations():
        plain = dense_matvec.dense_matvec(matrices, x, BF16)
    assert kernel.shape == plain.shape == (3, 12) and kernel.dtype == plain.dtype == BF16
    assert mx.allclose(kernel, plain, rtol=1e-2, atol=1e-2)


def of(kind, tokens=3, columns=352, dtype=F32, **options):
    return partial(cases.products, dtype, [(kind, 37), ("f32", 5)], columns, tokens, **options)


many = partial(cases.products, F32, [("f32", 2053)], 64, 4)  # of which a SIMD-group takes two
shared = partial(cases.products, F32, [("mxfp8", 11)], 8192, 1)  # SIMD-groups share rows
FAULTS = [
    ("dense_matvec_mxfp8", shared, "32 * U * SPLIT", "32 * U"),
    ("dense_matvec_mxfp8", shared, "y[i] += parts[", "y[i] = parts["),
    ("dense_matvec_mxfp8", of("mxfp8"), "scales[row * (all / 32) + c / 2]", "scales[c / 2]"),
    ("dense_matvec_mxfp8", of("mxfp8"), "(w >> 1) & 0x3f803f80u", "(w >> 1) & 0x3f003f80u"),
    ("dense_matvec_q8_0", of("q8_0"), "0x80808080u", "0x80808000u"),
    ("dense_matvec_q8_0", of("q8_0", dtype=BF16), "codes(w >> 8)", "codes(w >> 4)"),
    ("dense_matvec_bf16", of("bf16"), "word(p, 2 * i + 1)", "word(p, 2 * i)"),
    ("dense_matvec_bf16", of("bf16"), "at -= parts * groups", "at -= parts - 1"),
    ("dense_matvec_f16", of("f16"), "min(t, last) * stride", "0"),
    ("dense_matvec_f16", of("f16"), "simd_shuffle_xor(other, 1u << s)", "other"),
    ("dense_matvec_f32", many, "t < tokens && row0 + r < rows)", "true)"),
    (
        "dense_matvec_f32",
        of("f32"),
        "c0 + 32 * u <= last ? k.scale[u][r] * sum[r][t]",
        "true ? 1.0f",
    ),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
mx8, q8 = (partial(cases.products, BF16, [(kind, 37)], 1280, 5) for kind in ("mxfp8", "q8_0"))
TILE_FAULTS = [
    ("dense_tiles_mxfp8", mx8, "(v >> (8 * u))", "(v >> 8)"),
    ("dense_tiles_mxfp8", mx8, "own, upper, lower, c + SUBS", "own, upper, upper, c + SUBS"),
    ("dense_tiles_mxfp8", mx8, BARRIER, ""),
    ("dense_tiles_q8_0", q8, "halves(v.y, s + 2)", "halves(v.x, s + 2)"),
    ("dense_tiles_q8_0", q8, "row >= rows || ", ""),
    ("dense_tiles_q8_0", q8, "from / 4 + at % 4 / 2 * 8", "from / 4 + at % 4 * 8"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(TILE_FAULTS))
def test_fault_in_tiles_is_caught(name, compute, old, new, tiled):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)
    assert_two_each(TILE_FAULTS)


@executor_only
def test_texts_keep_apples_rules(tiled):
    every = [(kind, 9) for kind in cases.KINDS]
    with handed_to_metal() as handed:
        cases.products(F32, every, 64, 2)
        cases.products(BF16, every, 64, 5)
        every = [(kind, 9) for kind in ("mxfp8", "q8_0", "bf16")]
        cases.products(BF16, every, 128, 5)
    assert len(handed) == 3
    assert check(*(launch for _, launch in handed)) == []
