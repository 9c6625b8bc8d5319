"""Index scores and choices of many tokens by the kernels, on the CPU executor or on Metal itself."""

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
    on_metal,
)

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases import chunk_scores as cases
from ds4mlx.custom_kernels.cases.base import TOLERANCE
from ds4mlx.custom_kernels.layer import chunk_scores
from ds4mlx.state.row_forms import forms

BF16, F32 = mx.bfloat16, mx.float32


def of(coded=True, dtype=BF16, sizes=(21, 128), start=611, length=3, many=2):
    return partial(cases.compare, sizes, start, length, coded, dtype, forms, many)


def best(visible=600, kinds=900, each=16):
    values = cases.several(6 * 3000, 5, kinds).reshape(6, 3000)
    return partial(cases.select, values, visible, 64, each)


@executor_only
@pytest.mark.parametrize("tiles, buffers", [(2, 2), (2, 1), (1, 2)])
def test_more_rows_and_buffers_are_right_too(monkeypatch, tiles, buffers):
    """Those for which CUDA has the threadgroup memory, at a width for which Metal has it."""
    monkeypatch.setattr(chunk_scores, "tiled", lambda _: (tiles, buffers))
    with on_metal(), options_of(checked=True):
        for own in (of(sizes=(21, 32), start=1500), of(False, sizes=(16, 16), many=64, length=5)):
            assert cases.Case("", BF16, own).error() <= TOLERANCE[BF16]


@executor_only
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("where, tokens, rows", [("q", 1, 150), ("weight", 1, 150), ("row", 5, 1)])
def test_nan_reaches_the_scores_it_belongs_to(where, tokens, rows, coded):
    _, form = forms(128, 64, 64, BF16, coded)
    q, weights, held, start, _ = cases.operands((3, 64), 603, 5, form, BF16)
    if where == "q":
        q[2, 1, 40] = mx.nan
    elif where == "weight":
        weights[2, 1] = mx.nan
    else:
        held[40] = mx.array(0xFFFFFFFF, mx.uint32) if coded else mx.nan
    with on_metal():
        got = np.isnan(np.array(chunk_scores.by_kernel(q, weights, held, start, form.layout)))
    want = np.isnan(np.array(chunk_scores.plain(q, weights, held, start, form)))
    assert (got == want).all()
    assert got.any(1).sum() == tokens and got.any(0).sum() >= rows


def test_what_the_kernel_takes():
    def taken(heads=64, width=128, dtype=BF16, coded=True, kind=None, count=9, of=None):
        _, form = forms(128, width, 64, kind or dtype, coded)
        q = mx.zeros((3, heads, of or width), dtype)
        rows = mx.zeros((count, form.elements), form.dtype)
        with on_metal(), dispatch.kernels():
            return chunk_scores.takes(q, rows, form.layout)

    assert taken() and taken(dtype=F32) and taken(1, 32) and taken(coded=False)
    assert taken(width=48, coded=False) and taken(width=16, coded=False, dtype=F32)
    assert not taken(65) and not taken(width=256) and not taken(width=80, coded=False)
    assert not taken(width=24, coded=False) and not taken(of=64) and not taken(count=0)
    assert not taken(coded=False, kind=F32) and not taken(dtype=mx.float16)


@pytest.mark.parametrize("coded", [True, False])
def test_off_the_gpu_it_is_plain(coded):
    _, form = forms(128, 64, 64, F32, coded)
    own = cases.operands((3, 64), 130, 5, form, F32)
    assert mx.array_equal(chunk_scores.chunk_scores(*own), chunk_scores.plain(*own))


FLOAT = {"coded": False, "dtype": F32}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("chunk_scores_bf16", of(), "(x & 0x00080008u) << 12", "(x & 0x00080008u) << 11"),
    ("chunk_scores_bf16", of(), "(c / 32 % 4 * 8)", "(c / 32 % 2 * 8)"),
    ("chunk_scores_bf16", of(), "v[i + 4] = high(two)", "v[i + 4] = low(two)"),
    ("chunk_scores_bf16", of(), "piece * PIECE + c, own", "c, own"),
    ("chunk_scores_bf16", of(), "#define FOLD_B 8", "#define FOLD_B 4"),
    ("chunk_scores_bf16", of(), "v < 0 ? 0.0f : v", "v"),
    ("chunk_scores_bf16", of(), "weights[n * HEADS + h]", "weights[h]"),
    ("chunk_scores_bf16", of(start=608, length=6), "row < visible ?", "row <= visible ?"),
    ("chunk_scores_bf16", of(start=2), "place[0]) + end) / RATIO", "place[0]) + begin) / RATIO"),
    ("chunk_scores_bf16", of(), f"copied();\n        {BARRIER}", "copied();"),
    ("chunk_scores_bf16", of(), "min(row0 + r, count - 1)", "(row0 + r)"),
    ("chunk_scores_f32", of(**FLOAT), "v[i] < 0 ? 0.0f : c.v[i]", "v[i]"),
    ("chunk_scores_f32", of(**FLOAT), "16 * t + lane / 2, count", "16 * t + lane % 16, count"),
    ("chunk_scores_f32", of(**FLOAT), "sg * (16 * TILES)", "sg * (8 * TILES)"),
    ("index_select", best(), "scores[token * many + from", "scores[from"),
    ("index_select", best(66), "(OWN ? 0 : token)", "0"),
    (
        "index_select",
        best(),
        "token * threadgroups_per_grid.x + slice) * TOPK;\n    device uint*",
        "slice) * TOPK;\n    device uint*",
    ),
    ("index_select_next", best(2900, each=1), "chosen[token * many + from", "chosen[from"),
    ("index_select_next", best(2900, each=1), "ordered[token * many + from", "ordered[from"),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        of()()
        of(**FLOAT)()
    assert len(handed) == 2
    assert check(*(launch for _, launch in handed)) == []
