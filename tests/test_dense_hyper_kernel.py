"""The last product of a sublayer with the streams that follow, in one launch; on the executor or a Mac."""

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
from ds4mlx.custom_kernels.cases import dense_hyper as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.cases.hyper import fn_of, partials
from ds4mlx.custom_kernels.layer.after import After, beside
from ds4mlx.custom_kernels.layer.carried import Apart, carry
from ds4mlx.custom_kernels.products import dense_hyper
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.custom_kernels.recording import recording

F32, BF16 = mx.float32, mx.bfloat16


def sides(dtype, kind="mxfp8", width=64, columns=96, tokens=1):
    """A matrix, activations for it, streams, the weights of a hyper-connection, and the next matrix."""
    planes = random_planes(kind, (width, columns), 1)
    heads, streams = normal((tokens, columns), dtype, 1), normal((tokens, 4, width), dtype, 2)
    weights = After(normal((tokens, 4), F32, 3), normal((tokens, 4, 4), F32, 4))
    lying = weights if tokens > 1 else beside(mx.zeros((1, 7)), weights)
    fn = fn_of(24, width)
    return [kind, planes, heads, carry(streams, partials(streams, fn)), lying, fn]


def parts(carried):
    """Streams, and sums of their partial mixes: these may be over other slices of the channels."""
    return carried.streams, carried.partial.sum(axis=1)


@executor_only
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_gives_what_two_give(dtype):
    with on_metal(), dispatch.kernels():
        both = [way(*sides(dtype)) for way in (dense_hyper.by_kernel, dense_hyper.apart)]
    near = 1e-5 if dtype == F32 else 8e-3
    for one, two in zip(*map(parts, both), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert mx.allclose(one, two, rtol=near, atol=near)


@pytest.mark.parametrize(
    "changed, names",
    [
        ({}, ["dense_hyper_mxfp8"]),
        ({"tokens": 2}, ["dense_matvec_mxfp8", "hyper_out"]),
        ({"kind": "bf16", "columns": 72}, ["dense_hyper_bf16"]),
    ],
)
def test_how_many_launches(changed, names):
    with recording("cuda") as launches, dispatch.asking() as asked:
        dense_hyper.dense_hyper(*sides(BF16, **changed))
    assert [launch.name for launch in launches] == names
    assert {name for name, _ in asked} >= {names[0]}


def test_what_the_kernel_takes():
    kind, _, heads, carried, after, fn = sides(BF16)
    streams = Apart(carried.streams, carried.partial)
    apart = After(after.post, after.comb)
    with on_metal(), dispatch.kernels():
        assert dense_hyper.takes(kind, heads, carried, after, fn)
        assert not dense_hyper.takes(kind, heads, carried, apart, fn)
        assert not dense_hyper.takes("q4_k", heads, carried, after, fn)
        assert not dense_hyper.takes(kind, heads[:, :90], carried, after, fn)
        assert not dense_hyper.takes(kind, heads.astype(F32), carried, after, fn)
        assert not dense_hyper.takes(kind, heads, streams, after, fn)


@executor_only
@pytest.mark.parametrize("which, at", [(2, 0), (3, 0), (4, 7), (4, 11), (5, 0)])
def test_nan_goes_where_plain_operations_let_it(which, at):
    """In heads, streams, post, comb and the next matrix."""
    own = sides(F32)
    lying = own[which] if which in (3, 4) else None
    values = np.array(lying.array if lying else own[which])
    values.flat[at] = np.nan
    own[which] = lying._replace(array=mx.array(values)) if lying else mx.array(values)
    with on_metal():
        got = dense_hyper.by_kernel(*own)
    for mine, plain in zip(parts(got), parts(dense_hyper.plain(*own)), strict=True):
        assert mx.array_equal(mx.isnan(mine), mx.isnan(plain))


def of(kind, width=40, columns=352, dtype=F32, **options):
    return partial(cases.after, dtype, kind, width, columns, **options)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("dense_hyper_mxfp8", of("mxfp8"), "slice * 32 + group * HEIGHT", "slice * 32"),
    ("dense_hyper_mxfp8", of("mxfp8"), f"{BARRIER}\n    float v[4]", "float v[4]"),
    ("dense_hyper_q8_0", of("q8_0"), "comb[4 * j + group]", "comb[4 * group + j]"),
    ("dense_hyper_q8_0", of("q8_0"), "spread = post[group]", "spread = post[0]"),
    ("dense_hyper_bf16", of("bf16"), "after + AFTER_AT", "after"),
    ("dense_hyper_bf16", of("bf16"), "if (channel < WIDTH) merged", "merged"),
    ("dense_hyper_bf16", of("bf16"), "channel < WIDTH ? float(static_cast<T>(v)) : 0.0f", "v"),
    ("dense_hyper_f16", of("f16"), "(made + 4 * WIDTH)", "(made + 3 * WIDTH)"),
    ("dense_hyper_f16", of("f16"), "row = group + i * GROUPS", "row = group + i"),
    ("dense_hyper_f16", of("f16"), "slice * (FN_ROWS + 1) + FN_ROWS", "FN_ROWS"),
    ("dense_hyper_f32", of("f32"), f"{BARRIER}\n    if (group < 4)", "if (group < 4)"),
    ("dense_hyper_f32", of("f32"), "(row * 4 + j) * WIDTH", "(row + j) * WIDTH"),
]  # fmt: skip


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        for kind in ("mxfp8", "q8_0", "bf16", "f16", "f32"):
            for dtype in (F32, BF16):
                cases.after(dtype, kind, 40, 352)
    assert len(handed) == 10
    assert check(*(launch for _, launch in handed)) == []
