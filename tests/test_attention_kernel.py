"""Core attention by the kernels, run on the CPU executor, or on a Mac on Metal itself."""

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
from ds4mlx.custom_kernels.cases import attention as cases
from ds4mlx.custom_kernels.cases.attention import Sizes, Token
from ds4mlx.custom_kernels.cases.base import normal
from ds4mlx.custom_kernels.layer import attention
from ds4mlx.custom_kernels.layer.buffers import Grown, Recent, joined
from ds4mlx.custom_kernels.layer.plain import rms_norm, rotate
from ds4mlx.custom_kernels.layer.sink import sink_attention
from ds4mlx.custom_kernels.products.columns import whole
from ds4mlx.state.row_forms import StateForm, forms


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["official", "none"])
@pytest.mark.parametrize("ratio, position", [(0, 40), (4, 3), (4, 150), (128, 700)])
def test_without_kernels_it_is_what_the_modules_do(rounding, dtype, ratio, position):
    heads, width, rope, before = 3, 96, 64, 9
    config = ModelConfig(head_dim=width, qk_rope_head_dim=rope)
    form = StateForm.of(config, dtype, rounding).kv
    all_rows = form.pack(normal((position + 1, width), dtype, 1))
    q, sink = normal((1, heads, width), mx.float32, 2, 3.0), normal((heads,), mx.float32, 3)
    settled, count = max(0, position - 5), (position + 1) // ratio if ratio else 0
    done = max(0, count - 2)
    old = mx.concatenate([all_rows[:settled], all_rows[:settled]])[-20:]
    made = form.pack(normal((count + 4, width), dtype, 4))
    tails = [mx.concatenate([all_rows[settled:], all_rows[:3]]), made[done:]]
    recent, grown = joined(tails)
    window, rows = Recent(old, recent), Grown(made[: done + 1], grown) if ratio else None
    angles = mx.random.normal((4, 2, rope // 2), key=mx.random.key(5))
    place = mx.array([position, settled, *[done if ratio == r else 0 for r in (4, 128)], *[0] * 4])
    (got,) = attention.attention(
        *(whole(q.reshape(1, -1)), sink, [attention.Read(window, rows)], None),
        *(place.astype(mx.int32)[None], angles[None]),
        ratio=ratio,
        before=before,
        form=form,
        eps=1e-6,
        dtype=dtype,
    )
    turns = angles[1 if ratio else 0]
    turns = turns[:1], turns[1:]
    near = form.unpack(all_rows[max(0, position - before) :])
    sources = [(near, mx.full((1, len(near)), True))]
    sources += [(form.unpack(made[:count]), mx.full((1, count), True))] if count else []
    queries = rotate(rms_norm(q.astype(dtype), None, 1e-6), turns)
    want = rotate(sink_attention(queries, sources, sink, width**-0.5), turns, inverse=True)[0]
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == mx.float32 else 1e-2
    pair = [np.array(x.astype(mx.float32)) for x in (got, want)]
    np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance)


@executor_only
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("where, heads", [("q", 1), ("sink", 1), ("window", 4), ("rows", 4)])
def test_nan_reaches_the_heads_it_belongs_to(where, heads, coded):
    form, _ = forms(128, 128, 64, mx.bfloat16, coded)
    token = Token(151, 7, 3)
    arrays, options = cases.operands(4, cases.TINY, [Token(9), token], form, mx.bfloat16)
    nothing = form.pack(mx.full((128,), mx.nan, dtype=mx.bfloat16))
    if where == "q":
        arrays[0].array[1, 4 + 2 * 128 + 70] = mx.nan
    elif where == "sink":
        arrays[1][2] = mx.nan
    elif where == "window":
        tail = arrays[2][1].window.tail
        row = tail.begin + 3 * tail.row_words
        tail.array[row : row + tail.row_words] = nothing.view(mx.uint32)
    else:
        arrays[2][1].rows.full[11] = nothing
    with on_metal():
        got = mx.isnan(attention.by_kernel(*arrays, **options)).all(axis=2)
    assert got.tolist() == mx.isnan(attention.plain(*arrays, **options)).all(axis=2).tolist()
    assert got[1].sum().item() == heads
    assert where != "q" or not got[0].any()


def test_what_the_kernels_take():
    def taken(width=128, rope=64, ratio=0, rows=None, dtype=mx.bfloat16, kind=None, of=None):
        form, _ = forms(width, 128, rope, kind or dtype, kind is None)
        q, angles = whole(mx.zeros((1, 2 * (of or width)))), mx.zeros((1, 4, 2, rope // 2))
        options = {"ratio": ratio, "layout": form.layout, "dtype": dtype}
        with on_metal(), dispatch.kernels():
            return attention.takes(q, rows, angles, **options)

    grown = Grown(mx.zeros((8, 4)), joined([mx.zeros((8, 4))])[0])
    assert taken() and taken(512) and taken(384, 60) and not taken(384, 62)
    assert taken(ratio=4, rows=grown)
    assert taken(kind=mx.bfloat16) and not taken(kind=mx.float32)
    assert not taken(96) and not taken(640) and not taken(192) and not taken(of=100)
    assert not taken(rows=grown) and not taken(ratio=128) and not taken(ratio=8, rows=grown)
    assert not taken(dtype=mx.float16)


def of(ratio, token, coded=True, dtype=mx.bfloat16, sizes=cases.TINY):
    return partial(cases.compare, ratio, sizes, [token], coded, dtype, forms)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
several = [
    partial(cases.compare, r, cases.TINY, t, True, mx.bfloat16, forms) for r, t in cases.SEVERAL
]
NEAR, FAR, CHOSEN = Token(300, 9), Token(202, 5, 2), Token(151, 9, 5, 60)
MANY = Token(4600, 5, 2)
FAULTS = [
    ("attention_share", of(0, NEAR), "low_ = max(0, p - BEFORE)", "low_ = max(0, p - BEFORE - 1)"),
    ("attention_share", of(0, NEAR), "at < 0 ?", "at <= 0 ?"),
    ("attention_share", of(0, NEAR), "(at + KEEP)", "(at + KEEP - 1)"),
    ("attention_share", of(0, Token(20, 9)), "max(0, p - BEFORE)", "p - BEFORE"),
    ("attention_share", of(4, FAR), "uint(p + 1) / max(RATIO, 1)", "uint(p + 4) / max(RATIO, 1)"),
    ("attention_share", of(4, FAR), "RATIO == 4 ? 2 : 3", "1"),
    ("attention_share", of(4, FAR), "j < done", "j <= done"),
    ("attention_share", of(4, CHOSEN), "seen[i] = j >= 0;", ""),
    ("attention_share", of(4, CHOSEN), "named[n - near]", "int(n - near)"),
    ("attention_share", of(4, MANY), "sums[h][i] *= f[h];", ";"),
    ("attention_share", of(4, MANY), "exp(most - top);", "1.0f;"),
    ("attention_share", of(4, FAR), "CODED + c / 64) % 4", "CODED + c / 64 + 1) % 4"),
    (
        "attention_share",
        of(4, FAR),
        f"kept[group] = keeps;\n        {BARRIER}",
        "kept[group] = keeps;",
    ),
    ("attention_merge", of(0, Token(0)), "exp(bias - top)", "0.0f"),
    ("attention_merge", several[2], "shares + token", "shares + 0 * token"),
    ("attention_merge", several[2], "turns + token", "turns + 0 * token"),
    ("attention_share_2", several[0], "products + sequence * ALL", "products"),
    ("attention_share_2", several[0], "tails = (const device uint*)tails1;", ""),
    ("attention_share_4", several[1], "newer = tails + ROWS_AT", "newer = tails + WINDOW_AT"),
    ("attention_share_4", several[1], "places + 8 * sequence", "places"),
    ("attention_share_8", several[2], "max(place[5], 0) * CHOSEN", "0"),
    ("attention_share_8", several[2], "full = (const device uint*)full1;", ""),
    ("attention_share_8", several[2], "CHOSEN && place[5] >= 0", "CHOSEN"),
    ("attention_merge", of(4, FAR), "simd_shuffle(sum, s) != 0", "s > 1"),
    ("attention_merge", of(4, FAR), "-1.0f);\n", "1.0f);\n"),
    ("attention_merge", of(4, FAR), f"out4);\n    {BARRIER}", "out4);"),
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
        of(0, NEAR, False, mx.float32, Sizes(3, 256, 36))()
        several[1]()
        several[2]()
    assert len(handed) == 8
    assert check(*(launch for _, launch in handed)) == []
