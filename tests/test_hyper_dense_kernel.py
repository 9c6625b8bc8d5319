"""The first products of a sublayer with their input, in one launch; on the CPU executor or on a Mac."""

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
from ds4mlx.custom_kernels.cases import hyper
from ds4mlx.custom_kernels.cases import hyper_dense as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer.carried import Apart, carry
from ds4mlx.custom_kernels.products import hyper_dense
from ds4mlx.custom_kernels.products.columns import Inside
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.custom_kernels.recording import recording

F32, BF16 = mx.float32, mx.bfloat16
OPTIONS = {**cases.OPTIONS, "given": True}


def site(dtype, width=64, tokens=1):
    """Streams with their partial mixes, and the weights of a hyper-connection and of the norm."""
    streams = normal((tokens, 4, width), dtype, 4)
    sums = hyper.partials(streams, hyper.fn_of(24, width))
    weights = normal((24,), F32, 2), normal((3,), F32, 3), hyper.norm_of(width, dtype)
    return [carry(streams, sums), *weights]


def parts(before, rows=42):
    """Products with so many rows, the weights for what the sublayer gives, and its input."""
    x = before.x.value if isinstance(before.x, Inside) else before.x
    return before.products[:, :rows], before.after.post, before.after.comb, x


@executor_only
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_gives_what_two_give(dtype):
    """The same input to the last bit, of which the same products are made."""
    matrices = [(kind, random_planes(kind, (21, 64), 1)) for kind in ("mxfp8", "bf16")]
    with on_metal(), dispatch.kernels():
        both = [
            way(matrices, *site(dtype), **OPTIONS)
            for way in (hyper_dense.by_kernel, hyper_dense.apart)
        ]
    for one, two in zip(*map(parts, both), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert mx.allclose(one, two, rtol=1e-5, atol=1e-6)
    assert mx.array_equal(both[0].x.value, both[1].x)


@pytest.mark.parametrize(
    "kinds, width, tokens, names",
    [
        (["mxfp8", "bf16"], 64, 1, ["hyper_dense_mxfp8_bf16_given"]),
        (["mxfp8"], 64, 2, ["hyper_in", "dense_matvec_mxfp8"]),
        (["mxfp8"], 7200, 1, ["hyper_in", "dense_matvec_mxfp8"]),
        (["bf16"], 72, 1, ["hyper_in", "dense_matvec_bf16"]),
    ],
)
def test_how_many_launches(kinds, width, tokens, names):
    """One for one token, of a width that has room and is of whole eights of words."""
    matrices = [(kind, random_planes(kind, (3, width), 1)) for kind in kinds]
    with recording("cuda") as launches, dispatch.asking() as asked:
        hyper_dense.hyper_dense(matrices, *site(BF16, width, tokens), **OPTIONS)
    assert [launch.name for launch in launches] == names
    if len(names) == 1:
        assert {name for name, _ in asked} == {f"hyper_dense_{kind}" for kind in kinds}


def test_what_the_kernel_takes():
    carried = site(BF16)[0]
    with on_metal(), dispatch.kernels():
        for kind, taken in (("mxfp8", True), ("f32", True), ("q4_k", False)):
            assert hyper_dense.takes([(kind, {})], carried) == taken
        assert not hyper_dense.takes([("bf16", {})], Apart(carried.streams, carried.partial))


@executor_only
@pytest.mark.parametrize("which, at", [(0, 0), (0, -25), (1, 0), (2, 0), (3, 0)])
def test_nan_goes_where_plain_operations_let_it(which, at):
    """In streams, partial mixes, and each of the weights."""
    sides = site(F32)
    carried = sides[0] if which == 0 else None
    values = np.array(carried.array if carried else sides[which])
    values.reshape(-1)[at] = np.nan
    sides[which] = carried._replace(array=mx.array(values)) if carried else mx.array(values)
    matrices = [("bf16", random_planes("bf16", (5, 64), 1))]
    with on_metal():
        got = hyper_dense.by_kernel(matrices, *sides, **OPTIONS)
    want = hyper_dense.plain(matrices, *sides, **OPTIONS)
    for mine, plain in zip(parts(got, 5), parts(want, 5), strict=True):
        assert mx.array_equal(mx.isnan(mine), mx.isnan(plain))


def of(*shapes, width=352, dtype=F32, **options):
    return partial(cases.products, dtype, shapes, width, **options)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("hyper_dense_mxfp8", of(("mxfp8", 37)), "row = job * GROUPS + group", "row = group"),
    ("hyper_dense_mxfp8", of(("mxfp8", 37), ("f32", 5)), "every += each", "every += 1"),
    ("hyper_dense_q8_0", of(("q8_0", 37), ("f32", 5)), "job -= parts", "job -= 1"),
    ("hyper_dense_q8_0", of(("q8_0", 5), ("f32", 5)), "kind = 1", "kind = 0"),
    ("hyper_dense_bf16", of(("bf16", 37)), f"{BARRIER}\n    if (row >= rows) return;", "if (row >= rows) return;"),
    ("hyper_dense_bf16", of(("bf16", 37)), "comb = post + 4", "comb = post + 3"),
    ("hyper_dense_bf16", of(("bf16", 37), given=True), "threadgroup_position_in_grid.x == 1", "false"),
    ("hyper_dense_f16", of(("f16", 37)), "y[4 * i + 3]", "y[4 * i + 2]"),
    ("hyper_dense_f16", of(("f16", 37)), "words[place_of(i)]", "words[i]"),
    ("hyper_dense_f32", of(("f32", 37), dtype=BF16), "threadgroup_position_in_grid.x > 0", "true"),
    ("hyper_dense_f32", of(("f32", 37)), "c0 + 32 * u <= last ? k.scale[u][r] * sum[r][t]", "true ? 1.0f"),
]  # fmt: skip


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    every = [(kind, 9) for kind in ("mxfp8", "q8_0", "bf16", "f16", "f32")]
    with handed_to_metal() as handed:
        for dtype in (F32, BF16):
            cases.products(dtype, every, 64, given=True)
    assert len(handed) == 2
    assert check(*(launch for _, launch in handed)) == []
