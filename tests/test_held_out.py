"""Other shapes than the tiny checkpoint's, against a float64 NumPy model of the same definition."""

import make_checkpoint
import mlx.core as mx
import numpy as np
import pytest
from reference import kl, run, run_chunks
from refmodel import RefModel

from ds4mlx import load
from ds4mlx.convert import convert
from ds4mlx.evaluation.weights import decode_weights

SHAPES = {
    "pro_like": {  # no sliding-window layers, wider than tall
        "hidden_size": 384,
        "moe_intermediate_size": 128,
        "compress_ratios": [128, 128, 4, 128, 0],
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "o_groups": 3,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
        "num_hash_layers": 1,
        "q_lora_rank": 256,
    },
    "wide_heads": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "o_groups": 8,
        "o_lora_rank": 64,
        "index_n_heads": 16,
        "index_head_dim": 64,
        "index_topk": 5,
        "sliding_window": 33,
        "num_hash_layers": 0,
        "compress_ratios": [4, 0, 4, 128, 4, 0, 0],
        "hc_mult": 2,
    },
    "odd_constants": {
        "rms_norm_eps": 1e-5,
        "hc_eps": 3e-5,
        "hc_sinkhorn_iters": 3,
        "routed_scaling_factor": 2.5,
        "swiglu_limit": 4.0,
        "sliding_window": 1,
        "num_attention_heads": 4,
        "o_groups": 1,
        "compress_rope_theta": 40000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 512,
            "beta_fast": 16,
            "beta_slow": 2,
        },
    },
    "no_mtp_no_selection": {
        "num_nextn_predict_layers": 0,
        "num_hidden_layers": 3,
        "compress_ratios": [4, 128, 4],
        "num_hash_layers": 3,
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
        "index_topk": 512,
    },
}
LENGTH = 290
SHORT = 140  # past the first row of 128 tokens: for the weights as they are stored, slow on a CPU


@pytest.fixture(scope="module", params=SHAPES)
def held_out(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(request.param)
    make_checkpoint.make(str(base / "official"), 11, "tiny", SHAPES[request.param])
    convert(base / "official", base / "mlx", progress=False)
    return base


def settled_ids(path, mode: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their reference logits."""
    model = RefModel(str(path), mode, angle_dtype=np.float32)
    ids = np.random.default_rng(5).integers(0, model.cfg["vocab_size"], length)
    return ids, model.forward(ids)[0]


def test_exact_in_one_piece_and_in_many(held_out):
    ids, want = settled_ids(held_out / "official", "exact", LENGTH)
    model, _ = load(held_out / "mlx", dtype=mx.float32, rounding="none")
    assert np.abs(run(model, ids[:SHORT]) - want[:SHORT]).max() <= 1e-4
    decode_weights(model)  # the same values, three times as fast on a CPU
    pieces = run_chunks(model, ids, [3, 1, 1, 120, 1, 1, 1, 1, 1, 130, 1, 1, 1])
    assert np.abs(pieces - want).max() <= 1e-4
    assert (pieces.argmax(-1) == want.argmax(-1)).all()


def test_official_rounding(held_out):
    ids, want = settled_ids(held_out / "official", "kvsim", SHORT)
    model, _ = load(held_out / "mlx", dtype=mx.float32)
    got = run(model, ids)
    assert kl(want, got).mean() <= 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.99
