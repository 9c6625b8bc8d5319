"""Packed rows hold what the model's own rounding leaves, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import run

from ds4mlx import Model, load
from ds4mlx.config import ModelConfig
from ds4mlx.state.rounding import decode_fp4, encode_fp4, round_fp4, round_fp8
from ds4mlx.state.row_forms import PackedIndexRows, PackedKVRows, PlainRows, StateForm, row_bytes

SIZES = [1e-30, 1e-3, 1.0, 300.0, 1e6]


def bits(x):
    return np.array(x.astype(mx.float32)).view(np.uint32)


def random(shape, dtype, size, seed=0):
    return (mx.random.normal(shape, key=mx.random.key(seed)) * size).astype(dtype)


def test_flash_rows_take_584_and_68_bytes():
    config = ModelConfig()
    form = StateForm.of(config, mx.bfloat16, "official")
    assert (row_bytes(form.kv), row_bytes(form.index)) == (584, 68)
    form = StateForm.of(config, mx.float32, "official")
    assert (row_bytes(form.kv), row_bytes(form.index)) == (712, 68)
    form = StateForm.of(config, mx.bfloat16, "none")
    assert (row_bytes(form.kv), row_bytes(form.index)) == (1024, 256)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(("width", "rope"), [(512, 64), (128, 64), (96, 2), (160, 30), (256, 64)])
@pytest.mark.parametrize("size", SIZES)
def test_packed_kv_rows_are_the_rounded_rows(dtype, width, rope, size):
    form, rows = PackedKVRows(width, rope, dtype), random((2, 6, width), dtype, size)
    held = form.pack(rows)
    assert held.shape == (2, 6, form.elements)
    nope = width - rope
    want = mx.concatenate([round_fp8(rows[..., :nope]), rows[..., nope:]], axis=-1)
    assert np.array_equal(bits(form.unpack(held)), bits(want))
    assert np.array_equal(bits(form.unpack(held[:, 2:5])), bits(want[:, 2:5]))
    again = form.pack(form.unpack(held).astype(dtype))
    assert np.array_equal(bits(form.unpack(again)), bits(want))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("size", SIZES)
def test_packed_index_rows_are_the_rounded_rows(width, size):
    form, rows = PackedIndexRows(width), random((3, 5, width), mx.bfloat16, size)
    held = form.pack(rows)
    assert held.shape == (3, 5, form.elements)
    assert np.array_equal(bits(form.unpack(held)), bits(round_fp4(rows)))
    assert np.array_equal(bits(form.unpack(held[:1, 4:])), bits(round_fp4(rows[:1, 4:])))


@given(
    st.lists(
        st.sampled_from([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        min_size=31,
        max_size=31,
    )
)
def test_every_fp4_value_has_its_code(values):
    x = mx.array([*values, 6.0])
    assert decode_fp4(*encode_fp4(x)).tolist() == x.tolist()


def test_index_rows_are_what_mlx_calls_mxfp4():
    rows, keys = random((6, 128), mx.float32, 1.0), random((3, 128), mx.float32, 1.0, 1)
    codes, exponents = encode_fp4(rows)
    got = mx.quantized_matmul(
        keys, codes.view(mx.uint32), exponents, transpose=True, group_size=32, bits=4, mode="mxfp4"
    )
    assert mx.abs(got - keys @ round_fp4(rows).T).max().item() < 1e-4


def test_no_rows_are_no_rows():
    for form in (PackedKVRows(512, 64, mx.bfloat16), PackedIndexRows(128)):
        assert form.pack(mx.zeros((2, 0, form.width))).shape == (2, 0, form.elements)


class Unpacked(PlainRows):
    """Rounds as the model does and holds the values."""

    def __init__(self, packed):
        super().__init__(packed.width, mx.float32)
        object.__setattr__(self, "packed", packed)

    def pack(self, rows):
        return self.packed.unpack(self.packed.pack(rows)) if rows.size else rows.astype(mx.float32)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_model_reads_packed_rows_as_it_would_the_values(small_dir, dtype, monkeypatch):
    """Same logits in every bit as with rows held unpacked, in prefill and decoding."""
    ids = np.random.default_rng(3).integers(0, 288, 400)

    def logits():
        model: Model = load(small_dir, dtype=dtype)[0]
        cache = model.make_cache()
        parts = [run(model, ids[a:b], cache) for a, b in ((0, 290), (290, 390), (390, 391))]
        return np.concatenate(
            [*parts, *(run(model, ids[t : t + 1], cache) for t in range(391, 400))]
        )

    packed, form = logits(), StateForm.of
    monkeypatch.setattr(
        StateForm,
        "of",
        lambda *options: StateForm(*(Unpacked(f) for f in vars(form(*options)).values())),
    )
    assert np.array_equal(logits(), packed)
