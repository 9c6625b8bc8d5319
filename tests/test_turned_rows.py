"""Rows of many tokens in one launch: equal to plain operations, to the bit where nothing is summed."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metalsim import check
from spoiling import (
    assert_caught,
    assert_two_each,
    executor_only,
    fault_ids,
    handed_to_metal,
    on_metal,
)

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import turned as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer import turned_rows
from ds4mlx.custom_kernels.layer.row_layout import RowLayout
from ds4mlx.state.rounding import round_fp4
from ds4mlx.state.row_forms import PackedIndexRows, PackedKVRows, PlainRows, forms

F32, BF16 = mx.float32, mx.bfloat16


# Ties of the codes, sizes just above a power of two, zeros, and what is no number.
VALUES = [
    448,
    448.00003,
    17,
    18,
    19,
    1.0625,
    2**-9,
    1.5 * 2**-9,
    0,
    6,
    6.0000005,
    2.5,
    3.5,
    5,
    0.25,
]
VALUES += [0.75, 1.25, 1.75, 1e-4, 1e-30]


def still(tokens, width):
    """Angles that turn nothing."""
    return mx.ones((tokens, width // 2)), mx.zeros((tokens, width // 2))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("form", [PackedKVRows(128, 64, BF16), PackedIndexRows(128), None])
def test_rows_are_rounded_to_the_bit(form, dtype):
    rng = np.random.default_rng(1)
    signs = rng.choice([-1, 1], (40, 128)) * 2.0 ** rng.integers(-9, 9, (40, 4)).repeat(32, 1)
    x = mx.array((rng.choice(VALUES, (40, 128)) * signs + 0.0).astype(np.float32)).astype(dtype)
    if isinstance(form, PackedKVRows):
        form = PackedKVRows(128, 64, dtype)
    layout = form.layout if form else RowLayout("rounded", 128, 128, dtype)
    with on_metal():
        got = turned_rows.by_kernel(x, still(40, 64), layout)
    assert mx.array_equal(got, form.pack(x) if form else round_fp4(x))


@pytest.mark.parametrize("made", [cases.QUERIES, cases.KV, cases.INDEX_QUERIES])
def test_nan_stays_in_its_row(made):
    kind, normed, spread = made
    form = PackedKVRows(128, 64, F32) if kind == "kv" else PlainRows(128, F32)
    layout = form.layout if kind == "kv" else RowLayout(kind, 128, 128, F32)
    x = np.array(normal((3, 128), F32, 1))
    x[1, 5] = np.nan
    norm = {"norm": mx.ones((128,))} if normed == "weighted" else {}
    with on_metal():
        got = turned_rows.by_kernel(
            mx.array(x), still(3, 64), layout, normed=normed, spread=spread, eps=1e-6, **norm
        )
    values = np.array(form.unpack(got))
    assert np.isfinite(values[[0, 2]]).all()
    assert kind == "rounded" or np.isnan(values[1]).any()


def test_what_it_takes():
    def takes(width=128, rope=64, kind="plain", coded=0, spread=False, tokens=2):
        layout = RowLayout(kind, width, width, F32, coded, coded + 8)
        sides = mx.zeros((tokens, width)), still(tokens, rope), layout
        return turned_rows.takes(*sides, spread=spread)

    with on_metal(), dispatch.kernels():
        assert takes() and takes(width=192) and takes(kind="kv", coded=64) and takes(spread=True)
        assert not takes(width=96) and not takes(width=1088) and not takes(width=192, spread=True)
        assert not takes(kind="kv", coded=32) and not takes(rope=130) and not takes(tokens=0)


def of(made, dtype=F32, width=128, rope=64, shape=(5,)):
    return partial(cases.compare, made, dtype, width, rope, shape, forms)


FAULTS = [
    ("turned_plain_unit", of(cases.QUERIES, shape=(2, 3)), "row / EACH", "row"),
    ("turned_plain_unit", of(cases.QUERIES), "if (row >= count) return;", ""),
    ("turned_plain_unit", of(cases.QUERIES), "simd_sum(sum)", "sum"),
    ("turned_plain_weighted", of(cases.PLAIN), "e / 2 * 64 + 2 * lane", "e / 2 * 32 + 2 * lane"),
    ("turned_plain_weighted", of(cases.PLAIN, width=192), "(WIDTH - ROPE) / 2", "ROPE / 2"),
    ("turned_kv", of(cases.KV), "HEAD, at)", "HEAD, lane)"),
    ("turned_kv", of(cases.KV), "a * s + v", "a * s - v"),
    ("turned_index", of(cases.INDEX), "v[e ^ (h / 32)]", "v[e]"),
    ("turned_index", of(cases.INDEX), "v[2 * i + 1] = a - v", "v[2 * i + 1] = a + v"),
    ("turned_rounded", of(cases.INDEX_QUERIES), "? -size : size", "? size : size"),
    ("turned_rounded", of(cases.INDEX_QUERIES), "(2 * lane & h)", "(lane & h)"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    made = (cases.QUERIES, cases.PLAIN, cases.KV, cases.INDEX, cases.INDEX_QUERIES)
    with handed_to_metal() as handed:
        for each in made:
            of(each, BF16)()
    assert len(handed) == len(made)
    assert check(*(launch for _, launch in handed)) == []
