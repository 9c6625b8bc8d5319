"""The launches around a sublayer: equal to their references, and plainly to the modules."""

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

from ds4mlx import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import hyper as cases
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer import head_in, hyper_in, hyper_out
from ds4mlx.model.hyper import HyperConnection, HyperHead
from ds4mlx.model.linear import RMSNorm

F32, BF16 = mx.float32, mx.bfloat16
OPTIONS = {"iterations": 20, **cases.EPS}


@pytest.mark.parametrize("steep", [0.1, 1.0, 3.0, 10.0, 30.0])
def test_weights_between_streams_are_those_of_sinkhorn(steep):
    """Each weight, also those that hardly count beside the others; of mixes that are all 0."""
    streams, base = mx.zeros((8, 4, 64)), normal((24,), F32, 1, steep)
    sums, weights = mx.zeros((8, 3, 25)), (base, mx.ones((3,)), mx.ones((64,)))
    with on_metal():
        _, post, comb = hyper_in.by_kernel(streams, sums, *weights, **OPTIONS)
    exact = np.array(base).astype(np.float64)
    np.testing.assert_allclose(np.array(post), [2 / (1 + np.exp(-exact[4:8]))] * 8, rtol=1e-6)
    want = np.exp(exact[8:].reshape(4, 4))
    want = want / want.sum(1, keepdims=True) + 1e-6
    want /= want.sum(0) + 1e-6
    for _ in range(19):
        want /= want.sum(1, keepdims=True) + 1e-6
        want /= want.sum(0) + 1e-6
    np.testing.assert_allclose(np.array(comb), np.stack(8 * [want]), rtol=1e-6)


def site(made, dtype, width=64):
    """A site with weights, streams for it of 3 tokens, and a norm."""
    each = made(ModelConfig(hidden_size=width))
    each.fn = cases.fn_of(len(each.base), width)
    each.base, each.scale = normal(each.base.shape, F32, 2), normal(each.scale.shape, F32, 3)
    norm = RMSNorm(width, 1e-6)
    norm.weight = (1 + normal((width,), F32, 5, 0.3)).astype(dtype)
    return each, normal((3, 4, width), dtype, 4), norm


def assert_same(got, want):
    """To the last place of their type, which sums in another order may turn."""
    assert got.dtype == want.dtype
    near = 1e-5 if want.dtype == F32 else 8e-3
    got, want = (np.array(a.astype(F32)) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=near, atol=near * 1e-1)
    assert near < 1e-3 or (got == want).mean() > 0.95


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_plain_before_is_the_modules(dtype):
    own, streams, norm = site(HyperConnection, dtype)
    sums, weights = hyper_out.hyper_mix(streams, own.fn), (own.base, own.scale, norm.weight)
    wanted = own.before(streams, norm)
    for got, want in zip(
        hyper_in.hyper_in(streams, sums, *weights, **OPTIONS), wanted, strict=True
    ):
        assert_same(got, want)
    with on_metal(), dispatch.kernels():
        for got, want in zip(own.before(streams, norm), wanted, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_plain_head_is_the_modules(dtype):
    own, streams, norm = site(HyperHead, dtype)
    sums, weights = hyper_out.hyper_mix(streams, own.fn), (own.base, own.scale, norm.weight)
    assert_same(head_in.head_in(streams, sums, *weights, **cases.EPS), norm(own(streams)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=executor_only)])
@pytest.mark.parametrize("outs", [1, 2])
def test_after_is_the_modules(dtype, by_kernel, outs):
    """What a sublayer gives is rounded as the modules do, before it is spread."""
    own, streams, norm = site(HyperConnection, dtype)
    _, post, comb = own.before(streams, norm)
    given = [normal((3, 64), F32, 7 + i) for i in range(outs)]
    out = given[0] if outs == 1 else given[0] + given[1].astype(dtype).astype(F32)
    want = own.merge(streams, out.astype(dtype), post, comb)
    with on_metal(), dispatch.kernels(by_kernel):
        new, sums = hyper_out.hyper_out(streams, given, post, comb, own.fn)
    assert_same(new, want)
    np.testing.assert_allclose(
        np.array(sums.sum(1)),
        np.array(hyper_out.mix_plain(new, own.fn)[:, 0]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_kernels_take_four_streams_of_whole_loads():
    with on_metal(), dispatch.kernels():
        for shape, inside in (
            ((8, 4, 8192), True),
            ((65536, 4, 64), False),
            ((1, 3, 64), False),
            ((1, 4, 68), False),
            ((1, 4, 8200), False),
        ):
            streams = mx.zeros(shape)
            assert hyper_in.takes(streams) == head_in.takes(streams) == inside
            merges = hyper_out.takes(streams, mx.zeros((24, 1)), "hyper_out")
            assert merges == (inside or shape[2] == 8200)
        assert not hyper_out.takes(mx.zeros((1, 4, 64)), mx.zeros((33, 1)), "hyper_out")
    assert not hyper_in.takes(mx.zeros((1, 4, 64)))


def spoilt(x, *at):
    values = np.array(x.astype(F32))
    values[at] = np.nan
    return mx.array(values).astype(x.dtype)


def nan_in(arrays):
    """Which tokens of each array have a NaN, and which have nothing else."""
    flat = [np.isnan(np.array(a.astype(F32))).reshape(len(a), -1) for a in arrays]
    return [a.any(1).tolist() for a in flat], [a.all(1).tolist() for a in flat]


MIDDLE = [False, True, False]


@executor_only
@pytest.mark.parametrize("where", [(1, 0, 2), (1, 1, 9), (1, 0, 24)])
def test_nan_mix_stays_in_its_token(where):
    """A NaN among the sums for the collapse, for Sinkhorn's weights, and of the squares."""
    own, streams, norm = site(HyperConnection, F32)
    sums = spoilt(cases.partials(streams, own.fn), *where)
    weights = own.base, own.scale, norm.weight
    with on_metal():
        got = hyper_in.by_kernel(streams, sums, *weights, **OPTIONS)
    some, every = nan_in(got)
    want = nan_in(hyper_in.plain(streams, sums, *weights, **OPTIONS))
    assert (some, every) == want
    assert MIDDLE in some and all(each in (MIDDLE, [False] * 3) for each in some)


@executor_only
@pytest.mark.parametrize("which", ["streams", "out", "shared", "post", "comb"])
def test_nan_stays_in_its_token_after_a_sublayer(which):
    own, streams, _ = site(HyperConnection, BF16)
    sides = {"streams": streams, "out": normal((3, 64), F32, 1), "shared": normal((3, 64), F32, 2)}
    sides |= {"post": normal((3, 4), F32, 3), "comb": normal((3, 4, 4), F32, 4)}
    sides[which] = spoilt(sides[which], 1, *[2] * (sides[which].ndim - 1))
    streams, out, shared, post, comb = sides.values()
    with on_metal():
        new, sums = hyper_out.by_kernel(streams, [out, shared], post, comb, own.fn)
    plainly = hyper_out.plain(streams, [out, shared], post, comb, own.fn)[0]
    assert np.array_equal(np.isnan(np.array(new.astype(F32))), np.isnan(plainly.astype(F32)))
    some, _ = nan_in([new, sums])
    assert some == [MIDDLE, MIDDLE] and mx.isnan(sums.sum(1)[1]).all()


@executor_only
def test_nan_stays_in_its_token_before_the_head():
    own, streams, norm = site(HyperHead, BF16)
    sums = cases.partials(streams, own.fn)
    for spoiled in ((spoilt(streams, 1, 3, 5), sums), (streams, spoilt(sums, 1, 1, 3))):
        with on_metal():
            x = head_in.by_kernel(*spoiled, own.base, own.scale, norm.weight, **cases.EPS)
        assert nan_in([x]) == ([MIDDLE], [MIDDLE])


before = partial(cases.before, F32, 168, 2)
short = partial(cases.before, F32, 64, 2, steep=3.0, iterations=2)
head = partial(cases.head, F32, 168, 2)
after = partial(cases.after, BF16, 168, 3)
two = partial(cases.after, F32, 168, 3, outs=2)
mix = partial(cases.mix, F32, 168, 3)
many = partial(cases.many, F32, 296, 33)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("hyper_in", before, "sum += partial[", "sum = partial["),
    ("hyper_in", before, f"{BARRIER}\n    float mix", "float mix"),
    ("hyper_in", before, "x[4 * i + j].values", "x[4 * i + 3 - j].values"),
    ("hyper_in", before, "base[4 + four]", "base[four]"),
    ("hyper_in", before, "k[4 * i + 3] * column[3]", "k[4 * i + 3] * column[2]"),
    ("hyper_in", short, "n = 1; n < ITER", "n = 2; n < ITER"),
    ("hyper_in", before, "of_four(row, lane / 4)", "of_four(row, four)"),
    ("hyper_in", before, f"squares[group] = square;\n    {BARRIER}", "squares[group] = square;"),
    ("hyper_in", before, "+ 4, y + 8 * i + 4", "+ 4, y + 8 * i"),
    ("head_in", head, "float(4 * WIDTH)", "float(WIDTH)"),
    ("head_in", head, "s += SUMMING)", "s += GROUPS)"),
    ("head_in", head, "* norm * w[", "* w["),
    ("hyper_out", after, "16 + 4 * j + stream", "16 + 4 * stream + j"),
    ("hyper_out", after, "post[b * 4 + stream]", "post[stream]"),
    ("hyper_out", after, f"{BARRIER}\n    float sums", "float sums"),
    ("hyper_out", after, "? v[second] : v[first])", "? v[first] : v[second])"),
    ("hyper_out", after, "d < N ? 2 * i + 1 : i", "d < N ? 2 * i : i"),
    ("hyper_out_two", two, "shared_out + b * WIDTH", "shared_out"),
    ("hyper_out_two", two, "y[t] += float", "y[t] = float"),
    ("hyper_mix", mix, "(row * 4 + stream) * WIDTH", "(stream * 4 + row) * WIDTH"),
    ("hyper_mix", mix, "square = fma(v[t], v[t], square)", "square = fma(v[t], v[t], v[t])"),
    ("hyper_mix", mix, "row < ROWS && c < WIDTH", "row < ROWS"),
    ("hyper_mixes", many, "if (c < end) load8", "load8"),
    ("hyper_mixes", many, "first + at / 16 + 16 * i, count - 1)", "at / 16 + 16 * i, count - 1)"),
    ("hyper_mixes", many, "* SLICES + slice) * 25", "* SLICES) * 25"),
    ("hyper_mixes", many, f"k += AT_ONCE) {{\n        {BARRIER}", "k += AT_ONCE) {"),
    ("hyper_mixes", many, "simd_shuffle_xor(square, 2)", "square"),
    ("hyper_mixes", many, "own[m0], own[m0]", "own[m0], own[0]"),
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
            for compute in (cases.before, cases.head, cases.after, cases.mix, cases.many):
                compute(dtype, 168, 2)
            cases.after(dtype, 168, 2, outs=2)
    assert len({launch.source for _, launch in handed}) == len(handed) == 12
    assert check(*(launch for _, launch in handed)) == []
