"""Attention in blocks: same result, bounded scratch."""

import mlx.core as mx
import numpy as np
import pytest
from reference import run

from ds4mlx.custom_kernels.layer.sink import sink_attention
from ds4mlx.formats.dense import _widened_matmul
from ds4mlx.model import attention
from ds4mlx.model.batch import Batch
from ds4mlx.state.step import Step, commit


@pytest.mark.parametrize("scratch", [1, 3000, 40_000])
def test_block_size_does_not_change_the_result(exact_small, monkeypatch, scratch):
    ids = np.random.default_rng(2).integers(0, 288, 150)
    whole = run(exact_small, ids)
    monkeypatch.setattr(attention, "SCRATCH", scratch)
    assert np.abs(run(exact_small, ids) - whole).max() < 5e-5


def test_scratch_does_not_grow_with_tokens_times_rows(small_model, monkeypatch):
    """Attention over 4 times the depth takes the same scratch beyond what is per token."""
    monkeypatch.setattr(attention, "SCRATCH", 1 << 16)
    peaks = []
    for depth in (2048, 8192):
        cache = small_model.make_cache()
        x = mx.random.normal((depth, small_model.args.hidden_size))
        mx.eval(attended(small_model, x, cache[1]))
        chunk = mx.random.normal((512, small_model.args.hidden_size))
        mx.eval(chunk, cache[1].state)
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attended(small_model, chunk, cache[1]), cache[1].state)
        peaks.append(mx.get_peak_memory() - base)
    rows = 8192 // 4
    assert peaks[1] < peaks[0] + 512 * rows  # a full score matrix would take 512 * rows * heads * 4
    assert peaks[1] < 16e6


def attended(model, x, state):
    """What layer 1 makes of tokens x (L, D), and its state moves on."""
    step = Step(state.offset, len(x))
    batch = Batch.of(mx.zeros((len(x),), mx.int32), [step], model._rotary)
    out = model.layers[1].attn(x, batch, [state])
    commit([step])
    return out


def naive(q, rows, mask, sink, scale):
    """One query and head at a time, float64."""
    out = np.zeros(q.shape)
    for t, h in np.ndindex(q.shape[:2]):
        keys = rows[t][mask[t]]
        weight = np.exp(keys @ q[t, h] * scale)
        out[t, h] = weight @ keys / (weight.sum() + np.exp(sink[h]))
    return out


def test_sink_attention_against_a_loop():
    rng = np.random.default_rng(0)
    q, sink = rng.normal(size=(5, 3, 8)), rng.normal(size=3)
    shared, own = rng.normal(size=(7, 8)), rng.normal(size=(5, 4, 8))
    shared_mask, own_mask = rng.random((5, 7)) < 0.6, rng.random((5, 4)) < 0.6
    shared_mask[2], own_mask[2] = False, False
    got = sink_attention(
        mx.array(q).astype(mx.float32),
        [
            (mx.array(shared).astype(mx.float32), mx.array(shared_mask)),
            (mx.array(own).astype(mx.float32), mx.array(own_mask)),
        ],
        mx.array(sink).astype(mx.float32),
        0.3,
    )
    rows = np.concatenate([np.broadcast_to(shared, (5, 7, 8)), own], axis=1)
    want = naive(q, rows, np.concatenate([shared_mask, own_mask], axis=1), sink, 0.3)
    assert np.abs(np.array(got) - want).max() < 1e-6
    assert (np.array(got)[2] == 0).all()  # nothing visible: the sink takes all


def test_widened_matmul_in_blocks(monkeypatch):
    monkeypatch.setattr("ds4mlx.formats.dense.WIDEN_ROWS", 7)
    weight = mx.random.normal((30, 16)).astype(mx.bfloat16)
    x = mx.random.normal((2, 3, 16))
    want = np.array(x) @ np.array(weight.astype(mx.float32)).T
    assert np.abs(np.array(_widened_matmul(weight, x)) - want).max() < 1e-5
