"""Attention, indexer and angles about a million tokens deep, beside NumPy in float64: plainly, and by the
kernels for many tokens."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from spoiling import on_metal

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.recording import recording
from ds4mlx.model.attention import Context, Selection
from ds4mlx.model.batch import Batch
from ds4mlx.model.compressed_attention import attention_of
from ds4mlx.model.rope import frequencies, rotary_tables
from ds4mlx.state.row_forms import StateForm
from ds4mlx.state.step import Step

END = 1 << 20
CONFIG = ModelConfig(
    num_hidden_layers=3, num_nextn_predict_layers=0, num_hash_layers=0, compress_ratios=(0, 4, 128),
    hidden_size=64, vocab_size=64, num_attention_heads=2, head_dim=128, q_lora_rank=32, o_groups=1,
    o_lora_rank=32, qk_rope_head_dim=32, index_n_heads=2, index_head_dim=32, index_topk=512,
    n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
)  # fmt: skip
FORM = StateForm.of(CONFIG, mx.float32, "official")
RNG = np.random.default_rng(16)


def words(form, count):
    """Rows of random codes, none of which is a NaN; the exponents about 1."""
    width, elements = form.layout.width, form.elements
    held = RNG.integers(0, 256, (count, 4 * elements), np.uint8)
    if form.layout.kind == "kv":
        held[:, : form.coded] &= 0xBF
        held[:, form.coded : form.head] = RNG.integers(125, 129, (count, form.head - form.coded))
        held[:, form.head :] = RNG.normal(size=(count, form.rope)).astype(np.float32).view(np.uint8)
    else:
        held[:, width // 2 :] = RNG.integers(125, 129, (count, 4 * elements - width // 2))
    return mx.array(held.view(np.uint32))


def normal(*shape):
    return mx.array(RNG.normal(size=shape).astype(np.float32))


def deep(ratio, start, length):
    """An attention, queries of `length` tokens from `start` on, what they may see, and all angles."""
    attn = attention_of(CONFIG, CONFIG.compress_ratios.index(ratio), "official")
    attn.attn_sink = normal(CONFIG.num_attention_heads)
    tables = rotary_tables(CONFIG)
    batch = Batch.of(mx.zeros((length,), mx.int32), [Step(start, length)], tables)
    window = words(FORM.kv, CONFIG.sliding_window - 1 + length)
    rows = words(FORM.kv, (start + length) // ratio) if ratio else window[:0]
    selection = None
    if ratio == 4:
        q = FORM.index.unpack(words(FORM.index, length * CONFIG.index_n_heads))
        q = q.reshape(length, CONFIG.index_n_heads, -1)
        weights = normal(length, CONFIG.index_n_heads)
        weights[:, 0] = mx.abs(weights[:, 0])  # or hundreds of rows tie at 0
        selection = Selection(FORM.index, words(FORM.index, len(rows)), q, weights)
    q = normal(length, CONFIG.num_attention_heads, CONFIG.head_dim)
    context = Context(batch.spans[0], FORM.kv, window, rows, selection)
    return attn, q, context, batch.angles[ratio]


def exact(values):
    return np.array(values).astype(np.float64)


def true_turns(ratio, positions):
    """exp(i angle), the angle rounded to float32 as the model's."""
    angle = np.float32(positions)[:, None] * frequencies(CONFIG, ratio > 0)
    return np.exp(1j * angle.astype(np.float64))


def true_scores(selection, start):
    """float64 (L, R), -inf of rows that are not complete."""
    q, weights = exact(selection.queries), exact(selection.weights)
    rows = exact(selection.form.unpack(selection.rows))
    scores = sum(weights[:, h, None] * np.maximum(q[:, h] @ rows.T, 0) for h in range(q.shape[1]))
    seen = (start + np.arange(len(q)) + 1) // 4
    return np.where(np.arange(len(rows)) < seen[:, None], scores, -np.inf)


def true_attention(attn, q, context, chosen):
    """float64 (L, H, c); chosen: for each token the rows it attends to."""
    out, start = [], context.span.step.offset
    window = exact(context.form.unpack(context.window))
    for token, each in enumerate(exact(q)):
        keys = window[token : token + CONFIG.sliding_window]
        if len(context.rows):
            named = context.form.unpack(context.rows[mx.array(chosen[token])])
            keys = np.concatenate([keys, exact(named)])
        logits = each @ keys.T * CONFIG.head_dim**-0.5
        logits = np.concatenate([logits, exact(attn.attn_sink)[:, None]], axis=1)
        parts = np.exp(logits - logits.max(1, keepdims=True))
        out.append((parts / parts.sum(1, keepdims=True))[:, :-1] @ keys)
    out, rope = np.stack(out), CONFIG.qk_rope_head_dim
    turned = (out[..., -rope::2] + 1j * out[..., -rope + 1 :: 2]) / true_turns(
        attn.ratio, start + np.arange(len(out))
    )[:, None]
    out[..., -rope:] = np.stack([turned.real, turned.imag], -1).reshape(*out.shape[:2], rope)
    return out


def ties(got, scores):
    """Rows chosen for a token that float64 would not choose: all must tie with the last, within rounding."""
    best = np.argsort(-scores, kind="stable")[: CONFIG.index_topk]
    assert len(set(got.tolist())) == CONFIG.index_topk and (scores[got] > -np.inf).all()
    other = np.setdiff1d(got, best)
    assert (scores[best[-1]] - scores[other] <= 1e-6 * np.abs(scores[best]).max()).all()
    return len(other)


WAYS = {"plain": nullcontext, "kernels": on_metal}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio, start", [(0, END - 2), (4, END - 2), (128, 1_000_062)])
def test_attention_and_indexer(ratio, start, way):
    """Tokens of which one completes a row, and the last ones that there can be."""
    attn, q, context, angles = deep(ratio, start, 2)
    seen = (start + np.arange(2) + 1) // max(ratio, 1)
    chosen = [np.arange(count if ratio else 0) for count in seen]
    with WAYS[way](), dispatch.kernels(way == "kernels"):
        got = exact(attn.attend(q, context, angles))
        if ratio == 4:
            chosen = [np.array(each) for each in attn.chosen(context)]
    if ratio == 4:
        scores = true_scores(context.selection, start)
        assert sum(map(ties, chosen, scores)) <= 2
    want = true_attention(attn, q, context, chosen)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_the_kernels_are_those_of_chunks():
    for ratio in CONFIG.compress_ratios:
        attn, q, context, angles = deep(ratio, 9000, 3)
        with recording() as launches:
            attn.attend(q, context, angles)
        names = [launch.name for launch in launches]
        choice = ["chunk_scores_bf16", "index_select"] if ratio == 4 else []
        assert names == [*choice, "attention_chunk_f32"]


@pytest.mark.parametrize("start, length", [(END - 700, 700), (1_000_001, 130)])
def test_angles_of_a_chunk(start, length):
    """Of its tokens, and of the rows that they complete, by every table."""
    batch = Batch.of(mx.zeros((length,), mx.int32), [Step(start, length)], rotary_tables(CONFIG))
    for ratio in CONFIG.compress_ratios:
        pairs = [(batch.angles[ratio], np.arange(start, start + length))]
        if ratio:
            first, last = start // ratio, (start + length) // ratio
            pairs.append((batch.spans[0].rows[ratio], ratio * np.arange(first, last)))
        for (cos, sin), positions in pairs:
            want = true_turns(ratio, positions)
            assert len(positions) == len(cos) > 0
            assert np.abs(exact(cos) + 1j * exact(sin) - want).max() < 1e-7
