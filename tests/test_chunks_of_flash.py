"""Long prompts by the kernels' float32 form at Flash's own head sizes: 512 channels, 512 rows chosen, a
window of 128; beside the plain modules, however a prompt is cut."""

import mlx.core as mx
import numpy as np
import pytest
from spoiling import on_metal

from ds4mlx.bench.synth import synth_model
from ds4mlx.bench.whole_model import synthetic_state
from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.cases.chunk_scores import FLASH, operands
from ds4mlx.engine.prefill import prefill_chunk
from ds4mlx.model import attention
from ds4mlx.model.attention import visible_rows
from ds4mlx.model.indexer import Indexer
from ds4mlx.state.row_forms import forms

CONFIG = ModelConfig(
    num_hidden_layers=3, num_nextn_predict_layers=0, num_hash_layers=0, compress_ratios=(0, 4, 128),
    hidden_size=128, vocab_size=64, num_attention_heads=2, q_lora_rank=64, o_groups=1, o_lora_rank=64,
    index_n_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
)  # fmt: skip
BEFORE = 2171  # tokens, so that 543 rows of ratio 4 are complete
IDS = np.random.default_rng(8).integers(0, 64, (1, 5))


@pytest.fixture(scope="module")
def model():
    return synth_model(CONFIG, "official", mx.float32)


def logits(model, *lengths):
    """Of IDS in chunks of these lengths, after many tokens."""
    mx.random.seed(3)
    state, outs = synthetic_state(model, BEFORE), []
    for piece in np.split(IDS, np.cumsum(lengths)[:-1], axis=1):
        outs.append(model(piece, state))
    return np.array(mx.concatenate(outs, 1))


@pytest.fixture(scope="module")
def plain(model):
    with dispatch.plain_operations():
        return logits(model, 5)


@pytest.mark.parametrize("lengths", [(5,), (2, 3)])
def test_any_chunking(model, plain, lengths, launched):
    with on_metal(), dispatch.kernels():
        got = logits(model, *lengths)
    assert launched["attention_chunk_f32"] == len(lengths) * len(model.layers)
    for kernel in ("chunk_scores_bf16", "index_select"):
        assert launched[kernel] == len(lengths)
    np.testing.assert_allclose(got, plain, atol=1e-4)


def test_blocks_of_queries_are_evaluated_in_turn(model, plain, monkeypatch):
    """Where the scores of all of a chunk's queries are more than may exist at a time."""
    monkeypatch.setattr(attention, "SCRATCH", 1024)
    mx.random.seed(3)
    state = synthetic_state(model, BEFORE)
    with on_metal(), dispatch.kernels():
        got = prefill_chunk(model, IDS[0].tolist(), state, True)
    np.testing.assert_allclose(got, plain[:, -1], atol=1e-4)
    assert state.offset == BEFORE + IDS.size


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_the_rows_chosen_are_the_plain_ones(dtype):
    """Of 2,000 rows for each of 3 tokens, but for those that tie with the last within rounding."""
    _, form = forms(512, FLASH[1], 64, dtype, True)
    q, weights, rows, start, _ = operands(FLASH[:2], 8001, 3, form, dtype)
    indexer = Indexer(ModelConfig(), "official")
    with on_metal(), dispatch.kernels():
        assert indexer.launches(q, rows, form)
        chosen = np.array(indexer.best(q, weights, rows, form, start))
    scores = indexer.scores(q, weights, rows, form, 1 << 20)
    visible = visible_rows(start + mx.arange(3), len(rows), 4)
    plain, tied = np.array(indexer.select(scores, visible)), 0
    for own, got, want in zip(np.array(scores), chosen, plain, strict=True):
        other = np.setdiff1d(got, want)
        assert len(set(got)) == 512 and got.min() >= 0
        assert (own[want].min() - own[other] <= 1e-5 * np.abs(own).max()).all()
        tied += len(other)
    assert tied <= 3
