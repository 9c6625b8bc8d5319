"""Decoded matrices, and products with them, on the CPU executor or on a Mac."""

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
from ds4mlx.custom_kernels.cases import decode as cases
from ds4mlx.custom_kernels.cases.base import normal, relative
from ds4mlx.custom_kernels.products import dense
from ds4mlx.custom_kernels.products.decode import decode, reference
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.formats import FORMATS

F32, BF16 = mx.float32, mx.bfloat16


@pytest.fixture(autouse=True)
def metal():
    with on_metal(), dispatch.kernels():
        yield


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_every_code_and_scale_is_exact(kind):
    """Scales of all finite powers of two whose products float32 has room for, and all numbers."""
    codes = np.arange(256, dtype=np.uint8)
    codes = np.repeat((codes if kind == "mxfp4" else codes & 0xBF)[None], 120, 0)
    planes = {"weight": mx.array(codes).view(mx.uint32)}
    scales = np.repeat(np.arange(100, 220, dtype=np.uint8)[:, None], codes.size // 120 // 32, 1)
    planes["scales"] = mx.array(np.repeat(scales, 2, 1) if kind == "mxfp4" else scales)
    for dtype in (F32, BF16):
        assert mx.array_equal(decode(kind, planes, dtype), reference(kind, planes, dtype))


@pytest.mark.parametrize("kind, plane", [("mxfp8", "scales"), ("q8_0", "d"), ("q4_k", "d")])
def test_nan_stays_in_its_block(kind, plane):
    planes = random_planes(kind, (3, 512), 1)
    spoilt = np.array(planes[plane].astype(F32))
    spoilt[1, -1] = 255 if kind == "mxfp8" else np.nan
    planes[plane] = mx.array(spoilt).astype(planes[plane].dtype)
    got = np.isnan(np.array(decode(kind, planes, F32)))
    assert not got[[0, 2]].any() and got[1, -1] and not got[1, :256].any()


@pytest.mark.parametrize("scratch", [1, 3 * 256, 9 * 256, 1 << 26])
@pytest.mark.parametrize("groups", [0, 4])
def test_parts_give_what_the_whole_gives(scratch, groups, monkeypatch):
    """Float32 products stay float32's, however the matrix is cut."""
    monkeypatch.setattr(dense, "SCRATCH", scratch)
    lead = (groups,) if groups else ()
    planes, x = random_planes("mxfp8", (*lead, 9, 256), 1), normal((*lead, 11, 256), F32, 2)
    with recording("cuda") as launches:
        dense.product("mxfp8", planes, x)
    wanted = {1: 4 if groups else 9, 3 * 256: 4 if groups else 3, 9 * 256: 4 if groups else 1}
    assert len(launches) == wanted.get(scratch, 1)
    got = dense.product("mxfp8", planes, x)
    assert relative(got, x @ mx.swapaxes(FORMATS["mxfp8"].decode(planes), -1, -2)) < 1e-5


@pytest.mark.parametrize("stored", dense.DECODED)
def test_many_rows_are_multiplied_by_decoded_values(stored):
    planes, x = random_planes(stored, (8, 256), 1), normal((2, 5, 256), BF16, 2)
    with recording("cuda") as launches:
        dense.product(stored, planes, x)
    assert [launch.name for launch in launches] == [f"decode_{stored}_bf16"]
    got = dense.product(stored, planes, x)
    assert got.dtype == BF16 and got.shape == (2, 5, 8)
    assert relative(got, x.astype(F32) @ FORMATS[stored].decode(planes).T) < 2e-2


def of(format, dtype=F32):
    return partial(cases.values, format, dtype, (21, 256))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("decode_mxfp8", of("mxfp8"), "0x3f803f80u", "0x3f003f80u"),
    ("decode_mxfp8", of("mxfp8"), "/ 2 * 4 + i % 2", "/ 2 * 4 + i % 2 * 2"),
    ("decode_mxfp8", of("mxfp8"), "(first + at) / each", "first / each"),
    ("decode_mxfp4", of("mxfp4"), "if (first + word / WORDS < groups)", "if (true)"),
    ("decode_mxfp4", of("mxfp4", BF16), f"    }}\n    {BARRIER}", "    }"),
    ("decode_q8_0", of("q8_0"), "words[word + word / WORDS]", "words[word]"),
    ("decode_q8_0", of("q8_0", BF16), "i * THREADS + at", "i + WORDS * at / 2"),
    ("decode_q4_k", of("q4_k"), "% each, columns)", "% each, 2 * columns)"),
    ("decode_q4_k", of("q4_k"), "#define PER 8", "#define PER 4"),
    ("decode_q2_k", of("q2_k"), "put8(own + 8 * i", "put8(own + 8 * (3 - i)"),
    ("decode_q2_k", of("q2_k"), "size_t(first) * WORDS", "size_t(first)"),
    ("decode_iq2_xxs", of("iq2_xxs"), "i < LUT; i += THREADS", "i < LUT / 2; i += THREADS"),
    ("decode_iq2_xxs", of("iq2_xxs"), f"[i];\n        {BARRIER}", "[i];"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


@executor_only
def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        for format in dense.DECODED:
            for dtype in (F32, BF16):
                of(format, dtype)()
    assert len(handed) == 2 * len(dense.DECODED)
    assert check(*(launch for _, launch in handed)) == []
