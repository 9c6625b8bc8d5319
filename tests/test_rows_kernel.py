"""A token's rows by the kernel, run on the CPU executor, or on a Mac on Metal itself."""

from functools import partial

import mlx.core as mx
import pytest
from metalsim import check, options_of, record
from metalsim.kernel import REAL
from spoiling import assert_caught, assert_two_each, executor_only, fault_ids, on_metal

from ds4mlx.custom_kernels.cases import rows as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE
from ds4mlx.state.row_forms import PackedIndexRows, PackedKVRows, PlainRows


def forms(width, index, rope, dtype, coded):
    if coded:
        return PackedKVRows(width, rope, dtype), PackedIndexRows(index)
    return PlainRows(width, dtype), PlainRows(index, dtype)


@pytest.fixture(autouse=True)
def metal():
    with on_metal():
        yield


def named(cases):
    return [pytest.param(c, id=f"{c.name}, {str(c.dtype).rpartition('.')[2]}") for c in cases]


@pytest.mark.parametrize("case", named(cases.small(forms)))
def test_small(case):
    """Checked for races, stray accesses, and bytes that are never written."""
    with options_of(checked=True):
        assert case.error() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", named(cases.wide(forms)))
def test_wide(case):
    assert case.error() <= TOLERANCE[case.dtype]


def of(ratio, position, coded=True, dtype=mx.bfloat16, **where):
    token = cases.at(position, ratio, cases.TINY, **where)
    return partial(cases.compare, ratio, cases.TINY, token, coded, dtype, forms)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("rows_0", of(0, 300, back=9), "e < begin || e >= end", "true"),
    ("rows_0", of(0, 300, back=9), "slot = p - settled", "slot = p - settled + 1"),
    (
        "rows_0",
        of(0, 300, back=9),
        f"row[c] = as<T>(kv[c]);\n        {BARRIER}",
        "row[c] = as<T>(kv[c]);",
    ),
    ("rows_0", of(0, 300, back=9), "bytes[coded + groups + at] = 0", ""),
    ("rows_4", of(4, 1003, back=3), "old + (q - settled + keep)", "old + (q - settled + keep - 1)"),
    ("rows_4", of(4, 1003, back=3), "k >= 4 ? WIDTH + c : c", "k < 4 ? WIDTH + c : c"),
    ("rows_4", of(4, 3), "q >= 0", "true"),
    ("rows_4", of(4, 1003, back=3), "s[i][j] += float(bias[e + j])", "s[i][j] += 0"),
    ("rows_4", of(4, 1003, back=3), "rint(y) + 2.0f", "rint(y) + 3.0f"),
    ("rows_4", of(4, 1002, back=9), "full ? next * words : 0xffffffffu", "next * words"),
    ("rows_128", of(128, 1023, back=9), "simd_shuffle_xor(pooled[j], i)", "pooled[j]"),
    ("rows_128", of(128, 1023, back=9), "RATIO == 4 ? 2 : 3) * ROPE", "2) * ROPE"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


def test_texts_keep_apples_rules(monkeypatch):
    launches = []

    def maker(name, inputs, outputs, source, header=""):
        real = REAL(name, inputs, outputs, source, header=header)

        def call(*, inputs, output_shapes, output_dtypes, **launch):
            sides = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
            launches.append(record(real, inputs, **sides, **launch))
            return [mx.zeros(*side) for side in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", maker)
    for ratio in (0, 4, 128):
        of(ratio, 300)()
    of(4, 300, coded=False, dtype=mx.float32)()
    assert len(launches) == 4
    assert check(*launches) == []
