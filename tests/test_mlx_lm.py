"""The model runs under mlx-lm's own generation loop."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step


@pytest.mark.parametrize("mode", ["exact", "kvsim"])
def test_generate_step(exact_model, official_model, stored, mode):
    model = exact_model if mode == "exact" else official_model
    prompt = mx.array(stored["s700/ids"][:300].astype("int32"))
    want = stored[f"greedy/{mode}/ids"].tolist()
    steps = generate_step(prompt, model, max_tokens=len(want), prefill_step_size=100)
    assert [int(token) for token, _ in steps] == want


def test_the_attributes_of_an_mlx_lm_model(exact_model):
    assert len(exact_model.layers) == exact_model.args.num_hidden_layers
    weights = {"norm.weight": mx.ones(4)}
    assert exact_model.sanitize(weights) == weights
