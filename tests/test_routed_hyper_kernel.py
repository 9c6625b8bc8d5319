"""Down of the experts with the streams that follow, in one launch; on the CPU executor or on a Mac."""

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
from ds4mlx.custom_kernels.cases import routed as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.cases.hyper import fn_of, partials
from ds4mlx.custom_kernels.layer.after import After
from ds4mlx.custom_kernels.layer.carried import Apart, carry
from ds4mlx.custom_kernels.products import routed_hyper
from ds4mlx.custom_kernels.recording import recording

F32, BF16 = mx.float32, mx.bfloat16
SIZES = (5, 256, 320, 64)


def sides(dtype, tokens=1):
    """What the experts are given, and streams to merge it into."""
    *given, shared, _ = cases.down_of("q2_k", dtype, "mxfp8", SIZES, tokens, 3)
    after = After(normal((tokens, 4), F32, 3), normal((tokens, 4, 4), F32, 4))
    if tokens == 1:
        shared, after = cases.with_weights(shared, after)
    streams, fn = normal((tokens, 4, 64), dtype, 2), fn_of(24, 64)
    before = carry(streams, partials(streams, fn))
    return [*given, shared], routed_hyper.Streams(before, after, fn)


def parts(carried):
    """Streams, and sums of their partial mixes: these may be over other slices of the channels."""
    return carried.streams, carried.partial.sum(axis=1)


@executor_only
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_gives_what_two_give(dtype):
    given, streams = sides(dtype)
    with on_metal(), dispatch.kernels():
        ways = routed_hyper.by_kernel, routed_hyper.apart
        both = [way("q2_k", *given, streams) for way in ways]
    near = 1e-5 if dtype == F32 else 8e-3
    for one, two in zip(*map(parts, both), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert mx.allclose(one, two, rtol=near, atol=near)


@pytest.mark.parametrize(
    "tokens, names",
    [(1, ["routed_hyper_q2_k_half_mxfp8"]), (3, ["routed_down_q2_k_half_mxfp8", "hyper_out_two"])],
)
def test_how_many_launches(tokens, names):
    given, streams = sides(BF16, tokens)
    with recording("cuda") as launches, dispatch.asking() as asked:
        routed_hyper.routed_hyper("q2_k", *given, streams)
    assert [launch.name for launch in launches] == names
    assert {name for name, _ in asked} >= {names[0].removesuffix("_mxfp8")}


def test_what_the_kernel_takes():
    (_, values, shared), streams = sides(BF16)
    with on_metal(), dispatch.kernels():
        assert routed_hyper.takes("q2_k", values, shared, streams)
        assert not routed_hyper.takes("iq2_xxs", values, shared, streams)
        before = streams.before
        other = streams._replace(before=carry(before.streams.astype(F32), before.partial))
        assert not routed_hyper.takes("q2_k", values, shared, other)
        apart = streams._replace(before=Apart(before.streams, before.partial))
        assert not routed_hyper.takes("q2_k", values, shared, apart)
        apart = streams._replace(after=After(streams.after.post, streams.after.comb))
        assert not routed_hyper.takes("q2_k", values, shared, apart)
        many = streams._replace(fn=mx.zeros((33, 1)))
        assert not routed_hyper.takes("q2_k", values, shared, many)


@executor_only
@pytest.mark.parametrize(
    "which, at",
    [
        ("hidden", 0),
        ("products", 5),
        ("products", -20),
        ("products", -16),
        ("before", 0),
        ("fn", 0),
    ],
)
def test_nan_goes_where_plain_operations_let_it(which, at):
    """In products: among those of the shared expert, in post and in comb."""
    (down, routed, shared), streams = sides(F32)
    arrays = {"hidden": routed.array, "products": shared.gates.array}
    arrays |= {"before": streams.before.array, "fn": streams.fn}
    values = np.array(arrays[which])
    values.reshape(-1)[at] = np.nan
    arrays[which] = mx.array(values)
    hidden, products, before, fn = arrays.values()
    routed = routed._replace(array=hidden)
    before, after = streams.before._replace(array=before), streams.after._replace(array=products)
    both = (each._replace(array=products) for each in (shared.gates, shared.ups))
    shared = shared._replace(**dict(zip(("gates", "ups"), both, strict=True)))
    streams = routed_hyper.Streams(before, after, fn)
    own = "q2_k", down, routed, shared, streams
    with on_metal():
        got = routed_hyper.by_kernel(*own)
    wanted = parts(routed_hyper.plain(*own))
    assert mx.isnan(wanted[1]).any()
    for mine, plain in zip(parts(got), wanted, strict=True):
        assert mx.array_equal(mx.isnan(mine), mx.isnan(plain))


def of(format, shared="mxfp8", dtype=F32, width=40):
    return partial(cases.merged, format, dtype, shared, (5, 256, 320, width), 1, 3)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("routed_hyper_q2_k", of("q2_k"), "given[(row) - 32 * part] = y", "given[row] = y"),
    ("routed_hyper_q2_k", of("q2_k"), "+ float(static_cast<T>(common[lane]))", ""),
    ("routed_hyper_q2_k", of("q2_k"), f"{BARRIER}\n    {{\n        DENSE", "{\n        DENSE"),
    ("routed_hyper_q4_k", of("q4_k", "q8_0"), "common[(row) - 32 * part] = y", "given[(row) - 32 * part] += y"),
    ("routed_hyper_q4_k", of("q4_k", "q8_0"), "after + AFTER_AT", "after"),
    ("routed_hyper_q4_k", of("q4_k", "q8_0"), "spread = post[group]", "spread = post[0]"),
    ("routed_hyper_mxfp4", of("mxfp4", "bf16"), f"{BARRIER}\n    float v[4]", "float v[4]"),
    ("routed_hyper_mxfp4", of("mxfp4", "bf16"), "fma(kept[j], old[j], v)", "v + old[j]"),
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
        for dtype in (F32, BF16):
            for format, shared in (("q2_k", "mxfp8"), ("q4_k", "q8_0"), ("mxfp4", "bf16")):
                of(format, shared, dtype)()
    own = [launch for name, launch in handed if name.startswith("routed_hyper")]
    assert len(own) == 6
    assert check(*own) == []
