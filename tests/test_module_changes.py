"""What a model's modules are, and that no change of one goes unnoticed."""

import mlx.core as mx
import pytest
from test_synth import SMALL

from ds4mlx.bench.synth import synth_model
from ds4mlx.engine.ahead import Seen
from ds4mlx.model.module import changes


@pytest.fixture
def model():
    return synth_model(SMALL, "q2", mx.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.pop("attn_sink"),
        lambda module: module.__ior__({"attn_sink": module.attn_sink}),
        lambda module: module.setdefault("attn_sink", None),
        lambda module: module.clear(),
        lambda module: module.popitem(),
        lambda module: module.update({"attn_sink": module.attn_sink}),
    ],
    ids=["pop", "or", "setdefault", "clear", "popitem", "update"],
)
def test_every_way_to_change_a_module_counts(model, change):
    """So that no step ahead and no trace is of another model."""
    seen, before = Seen(model), changes()
    assert seen.same()
    change(model.layers[0].attn)
    assert changes() > before and not seen.same()
