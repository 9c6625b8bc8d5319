"""A token's rows by the kernel, run on the CPU executor, or on a Mac on Metal itself."""

import math
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

from ds4mlx.custom_kernels.cases import rows as cases
from ds4mlx.custom_kernels.layer import rows
from ds4mlx.state.row_forms import forms


@pytest.fixture(autouse=True)
def metal():
    with on_metal():
        yield


def of(ratio, position, coded=True, dtype=mx.bfloat16, others=0, **where):
    token = cases.at(position, ratio, cases.TINY, **where)
    return partial(cases.compare, ratio, cases.TINY, token, coded, dtype, forms, others)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("rows_0", of(0, 300, back=9), "e < begin || e >= end", "true"),
    ("rows_0", of(0, 300, back=9), "slot = p - settled", "slot = p - settled + 1"),
    (
        "rows_0",
        of(0, 300, back=9),
        f"row[c] = as<T>(own[KV_AT + c]);\n        {BARRIER}",
        "row[c] = as<T>(own[KV_AT + c]);",
    ),
    ("rows_0", of(0, 301, back=9), "products + job * ALL", "own"),
    ("rows_0", of(0, 300, back=9), "bytes[coded + groups + at] = 0", ""),
    ("rows_4", of(4, 1003, back=3), "old + (q - settled + keep)", "old + (q - settled + keep - 1)"),
    ("rows_4", of(4, 1003, back=3), "k >= 4 ? WIDTH + c : c", "k < 4 ? WIDTH + c : c"),
    ("rows_4", of(4, 3), "q >= 0", "true"),
    ("rows_4", of(4, 1003, back=3), "s[i][j] += float(bias[e + j])", "s[i][j] += 0"),
    ("rows_4", of(4, 1003, back=3), "rint(y) + 2.0f", "rint(y) + 3.0f"),
    ("rows_4", of(4, 1002, back=9), "full ? next * words : 0xffffffffu", "next * words"),
    ("rows_4", of(4, 1003, back=3, others=1), "index_old = (const device float*)index_old1;", ""),
    ("rows_4", of(4, 1003, back=3, others=4), "state = FIRST + sequence", "state = sequence"),
    ("rows_128", of(128, 1023, back=9), "simd_shuffle_xor(pooled[j], i)", "pooled[j]"),
    ("rows_128", of(128, 1023, back=9), "RATIO == 4 ? 2 : 3) * ROPE", "2) * ROPE"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        for ratio in (0, 4, 128):
            of(ratio, 300)()
        of(4, 300, coded=False, dtype=mx.float32)()
        for ratio in (0, 4, 128):
            of(ratio, 300, others=5)()
    assert len(handed) == 4 + 3 * 2
    assert check(*(launch for _, launch in handed)) == []


# Ties of E4M3 and E2M1, sizes just above a power of two or a largest code, zeros; no subnormal
# numbers, which GPUs may take for zeros.
HOSTILE = [448, 448.00003, 449, 17, 18, 19, 1.0625, 1.1875, 2**-9, 2**-10, 1.5 * 2**-9, 0, -0.0]
HOSTILE += [6, 6.0000005, 2.5, 3.5, 5, 0.25, 0.75, 1.25, 1.75, 1e-4, 1e-30, 3e38]


def hostile(width, group, seed):
    """Weights of a row: every group of channels has another largest size."""
    rng = np.random.default_rng(seed)
    values = rng.choice(HOSTILE, width) * rng.choice([-1, 1], width)
    sizes = 2.0 ** rng.integers(-12, 12, width // group).repeat(group)
    small = rng.random(width // group).repeat(group) < 0.7  # without the largest of all
    values = np.where(small & (abs(values) > 500), 1.0, values)
    return np.clip(values * sizes, -3e38, 3e38).astype(np.float32)


def signs(width, seed):
    return mx.array(np.random.default_rng(seed).choice([-1.0, 1.0], width).astype(np.float32))


def put(product, values):
    """In the place of the token's product."""
    product.array[cases.NUMBER, product.begin : product.begin + product.width] = values


def exact(ratio, position, coded, dtype, seed, spread=False, weights=hostile):
    """Operands whose rows are exactly their norms' weights: nothing but the packing rounds."""
    sizes, forms_of_rows = cases.TINY, forms(128, 128, 64, dtype, coded)
    arrays, options = cases.operands(
        ratio, sizes, cases.at(position, ratio, sizes, back=5), forms_of_rows, dtype
    )
    put(arrays[0], signs(128, seed))
    arrays[7] = mx.stack([mx.ones((3, 4, 32)), mx.zeros((3, 4, 32))], 2)
    arrays[2] = mx.array(weights(128, 64, seed + 1)).astype(dtype)
    for i, each in enumerate(arrays[4]):
        put(each.values, mx.concatenate([signs(128, seed + i)] * (each.values.width // 128)))
        put(each.scores, mx.array(1e30))  # so that the others have no weight at all
        arrays[4][i] = each._replace(
            norm=mx.array(weights(128, 32, seed + 2 + i)).astype(dtype),
            spread=spread,
        )
    return arrays, options | {"eps": 0.0}


def assert_same_bits(arrays, options):
    got, want = (side(*arrays, **options) for side in (rows.by_kernel, rows.plain))
    (found,), (expected,) = got.held, want.held
    for a, b in zip(found.tails[::2], expected.tails[::2], strict=True):
        assert mx.array_equal(a.value, b.value)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("coded", [True, False], ids=["coded", "plain"])
@pytest.mark.parametrize("ratio, position", [(0, 9), (4, 3), (4, 1_000_003), (128, 255)])
def test_exact_rows_are_packed_to_the_bit(ratio, position, coded, dtype):
    for seed in range(5):
        assert_same_bits(*exact(ratio, position, coded, dtype, 10 * seed))


def test_transformed_index_rows_are_packed_to_the_bit():
    def whole(width, group, seed):
        return np.random.default_rng(seed).integers(-99, 99, width).astype(np.float32)

    for seed in range(5):
        assert_same_bits(*exact(4, 1003, True, mx.float32, 10 * seed, True, whole))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_nan_stays_in_the_rows_it_is_in(ratio, value):
    token = cases.at(1023, ratio, cases.TINY, back=9, behind=1)
    kinds = forms(128, 128, 64, mx.bfloat16, True)
    arrays, options = cases.operands(ratio, cases.TINY, token, kinds, mx.bfloat16)
    for each, channel in [(arrays[0], 5), (arrays[1], 5), *((e.values, -5) for e in arrays[4])]:
        put(each._replace(begin=each.begin + channel % each.width, width=1), mx.array(value))
    got = rows.by_kernel(*arrays, **options)
    # An infinity leaves a NaN where it was, and zeros elsewhere.
    latent = mx.isnan(got.latents)
    assert bool(latent[1].any()) and (value == math.inf or latent[1].all())
    assert not latent[0].any() and not latent[2].any()
    (found,), (given,), places = got.held, arrays[5], [token.position - token.settled]
    places += [1023 // ratio - token.rows] if ratio else []
    for new, before, place in zip(found.tails[::2], given.tails[::2], places, strict=False):
        tail, old = new.value, before.value
        others = mx.arange(len(tail)) != place
        assert bool(((tail == old).all(axis=1) == others).all())
        assert bool(mx.isnan(kinds[0].unpack(tail)[place]).any())
