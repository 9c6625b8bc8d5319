"""Core attention of many tokens by the kernel, run on the CPU executor, or on a Mac on Metal itself."""

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

from ds4mlx.custom_kernels import dialect, dispatch
from ds4mlx.custom_kernels.cases import chunk_attention as cases
from ds4mlx.custom_kernels.cases.chunk_attention import Chunk
from ds4mlx.state.row_forms import forms


def of(ratio, chunk, coded=True, dtype=mx.bfloat16, sizes=cases.TINY):
    return partial(cases.compare, ratio, sizes, chunk, coded, dtype, forms)


NEAR, FAR, CHOSEN = Chunk(300, 2), Chunk(402, 3), Chunk(201, 3, 30)
BEGIN, MANY = Chunk(0, 3), Chunk(4001, 2, 100)


@executor_only
@pytest.mark.parametrize("heads, block, tiles, split", [(32, 64, 1, 1), (64, 32, 2, 2)])
def test_larger_tiles_are_right_too(monkeypatch, heads, block, tiles, split):
    """Those for which CUDA has the threadgroup memory, at a width for which Metal has it."""
    size = 2 * (block * 136 + heads * (block + 8)) + 4 * (
        split * heads * (block + 4) + heads + 2 * block
    )
    own = cases.chunk_attention.Plan(heads, block, tiles, split, size, 0)
    monkeypatch.setattr(cases.chunk_attention, "plan", lambda *_: own)
    with on_metal(), options_of(checked=True):
        for compute in (of(4, MANY, sizes=cases.Sizes(64, 128, 64)), of(4, FAR)):
            assert cases.Case("", mx.bfloat16, compute).error() <= 4e-3


@executor_only
@pytest.mark.parametrize("where, reached", [("q", 1), ("sink", 3), ("window", 8), ("rows", 4)])
def test_nan_reaches_the_heads_it_belongs_to(where, reached):
    """Of 3 tokens and 4 heads."""
    form, _ = forms(128, 128, 64, mx.bfloat16, True)
    arrays, options = cases.operands(4, cases.TINY, Chunk(201, 3), form, mx.bfloat16)
    nothing = form.pack(mx.full((128,), mx.nan, dtype=mx.bfloat16))
    if where == "q":
        arrays[0][1, 2, 70] = mx.nan
    elif where == "sink":
        arrays[1][2] = mx.nan
    elif where == "window":
        arrays[2][-2] = nothing  # the second token's
    else:
        arrays[3][50] = nothing  # complete with the last token
    with on_metal():
        got = mx.isnan(cases.chunk_attention.by_kernel(*arrays, **options)).all(axis=2)
    assert (
        got.tolist()
        == mx.isnan(cases.chunk_attention.plain(*arrays, **options)).all(axis=2).tolist()
    )
    assert got.sum().item() == reached


def test_what_the_kernel_takes():
    def taken(width=128, rope=64, ratio=0, rows=0, dtype=mx.bfloat16, kind=None, of=None):
        form, _ = forms(width, 128, rope, kind or dtype, kind is None)
        held = mx.zeros((max(rows, 5), form.elements), form.dtype)
        q, turns = mx.zeros((3, 2, of or width), dtype), mx.zeros((3, rope // 2))
        arrays = q, mx.zeros((2,)), held[:5], held[:rows], (turns, turns)
        with on_metal(), dispatch.kernels():
            return cases.chunk_attention.takes(*arrays, ratio=ratio, form=form)

    assert taken() and taken(512) and taken(384, 60) and not taken(384, 62)
    assert taken(ratio=4, rows=9) and taken(ratio=128, rows=1)
    assert taken(kind=mx.bfloat16) and not taken(kind=mx.float32)
    assert not taken(96) and not taken(640) and not taken(192) and not taken(of=100)
    assert not taken(ratio=8, rows=1) and not taken(dtype=mx.float16)


def test_off_the_gpu_it_is_plain():
    form, _ = forms(128, 128, 64, mx.float32, True)
    arrays, options = cases.operands(4, cases.TINY, CHOSEN, form, mx.float32)
    got = cases.chunk_attention.chunk_attention(*arrays, **options)
    assert mx.array_equal(got, cases.chunk_attention.plain(*arrays, **options))


def test_the_model_prefills_by_it(stored_model, monkeypatch):
    """Two chunks, of which the second has more rows than are chosen."""
    launched, call = [], dialect.Kernel.__call__

    def noted(self, *arguments, **options):
        launched.append(self.name)
        return call(self, *arguments, **options)

    def logits():
        state = stored_model.make_cache()
        ids = np.random.default_rng(3).integers(0, 288, (1, 59))
        return np.array(
            mx.concatenate([stored_model(p, state) for p in (ids[:, :31], ids[:, 31:])], 1)
        )

    monkeypatch.setattr(dialect.Kernel, "__call__", noted)
    with on_metal(), dispatch.kernels():
        got = logits()
    assert launched.count("attention_chunk_f32") == 2 * len(stored_model.layers)
    assert {"chunk_scores_bf16", "index_select"} <= set(launched)
    np.testing.assert_allclose(got, logits(), atol=1e-4)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = [
    ("attention_chunk", of(0, NEAR), "max(0, p - BEFORE)", "max(0, p - BEFORE - 1)"),
    ("attention_chunk", of(0, NEAR), "low -= place[1]", "low -= place[1] - 1"),
    ("attention_chunk", of(4, FAR), "uint(p + 1) / max(RATIO, 1)", "uint(p + 4) / max(RATIO, 1)"),
    ("attention_chunk", of(4, FAR), "int(2 * j + 1)", "int(2 * j)"),
    ("attention_chunk", of(4, CHOSEN), "named < 0 ? visible", "named < 0 ? 0u"),
    ("attention_chunk", of(4, CHOSEN), "chosen + token * CHOSEN", "chosen"),
    ("attention_chunk", of(4, MANY), "keeps = exp(most[i] - top)", "keeps = 1.0f"),
    ("attention_chunk", of(4, FAR), "scale_rows(sums[t][j], factors + 16 * t, lane);", ";"),
    ("attention_chunk", of(4, FAR), "lane / 2 % 4;\n  for", "lane / 2 % 2;\n  for"),
    ("attention_chunk", of(4, FAR), "next[id] = lies_at", "here[id] = lies_at"),
    ("attention_chunk", of(0, BEGIN), "exp(bias - most[i])", "0.0f"),
    ("attention_chunk", of(4, FAR), "a * co + v[n + 1] * si", "a * co - v[n + 1] * si"),
    ("attention_chunk", of(4, FAR), f"copied();\n        {BARRIER}", "copied();"),
    ("attention_chunk", of(4, FAR), f"factors[h] = keeps;\n        }}\n        {BARRIER}", "}"),
    ("attention_chunk", of(4, FAR, dtype=mx.float32), "(lane % 2 * 4 + i)", "(lane % 2 * 4)"),
    (
        "attention_chunk",
        of(4, FAR, dtype=mx.float32),
        "lane / 2 * ld + lane % 2 * 4",
        "lane / 2 * ld",
    ),
]


@executor_only
@pytest.mark.parametrize("name, compute, old, new", fault_ids(FAULTS))
def test_fault_is_caught(name, compute, old, new):
    assert_caught(name, compute, old, new)


def test_every_kernel_has_two_faults():
    assert_two_each(FAULTS)


def test_texts_keep_apples_rules():
    with handed_to_metal() as handed:
        of(4, CHOSEN)()
        of(0, NEAR, False, mx.float32, cases.ODD)()
    assert len(handed) == 2
    assert check(*(launch for _, launch in handed)) == []
