"""Generations that end because the model's values are not finite numbers."""

import mlx.core as mx
import pytest
from steering import tokens_of

from ds4mlx import DataError, stream_generate
from ds4mlx.custom_kernels import dispatch
from ds4mlx.engine.not_finite import blame
from ds4mlx.engine.sampling import Sampler
from ds4mlx.model.taps import Listener, listening

PROMPT = "def add(a, b):\n    return"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"sampler": Sampler(top_p=0.9)}, {"sampler": Sampler()}])
@pytest.mark.parametrize("taken", [0, 3])
def test_logits_that_are_not_finite_end_the_answer(talker, value, options, taken):
    """With the cache as far as it was before, so that a sound model can go on."""
    model, tokenizer = talker
    ids, cache, weight = tokenizer.encode(PROMPT), model.make_cache(), model.norm.weight
    want = tokens_of(stream_generate(model, tokenizer, ids, 6))
    run = stream_generate(model, tokenizer, ids, 6, cache=cache, **(options if not taken else {}))
    seen = tokens_of(next(run) for _ in range(taken))
    try:
        model.norm.weight = weight * value
        with pytest.raises(DataError, match="not finite numbers"):
            next(run)
    finally:
        model.norm.weight = weight
    assert cache.offset == (len(ids) + taken - 1 if taken else 0)
    rest = stream_generate(model, tokenizer, (ids + seen)[cache.offset :], 6 - taken, cache=cache)
    assert seen + tokens_of(rest) == want


def planted(array):
    """An array with NaN in its first column, or in its first place."""
    array = mx.array(array)
    array[..., 0] = mx.nan
    return array


@pytest.mark.parametrize(
    ("path", "name", "place"),
    [
        ("embed", "weight", "the embedding"),
        ("head", "weight", "the head"),
        ("norm", "weight", "the head"),
        ("layers.0.attn_norm", "weight", "layer 0"),
        ("layers.1.hc_ffn", "base", "layer 1"),
        ("layers.2.ffn.gate", "weight", "layer 2"),
        ("layers.2.attn", "attn_sink", "layer 2"),
    ],
)
@pytest.mark.parametrize("taken", [0, 2])
def test_the_layer_whose_values_are_not_finite_is_named(talker, path, name, place, taken):
    """Whether the prompt or a step meets it; the cache goes back to before."""
    model, tokenizer = talker
    module, cache = dict(model.named_modules())[path], model.make_cache()
    run = stream_generate(model, tokenizer, PROMPT, 6, cache=cache, prefill_step=7)
    for _ in range(taken):
        next(run)
    before, sound = cache.offset, getattr(module, name)
    try:
        setattr(module, name, planted(sound))
        with pytest.raises(DataError, match=f"not finite numbers.*: {place} is the first part"):
            next(run)
    finally:
        setattr(module, name, sound)
    assert cache.offset == before


class Planted(Listener):
    """Makes NaN of the first token's values in a quantity, of calls of several tokens."""

    def __init__(self, name):
        self.name = name

    def wants(self, name):
        return name == self.name

    def take(self, name, value, span):
        return mx.where(mx.arange(len(value))[:, None] == 0, mx.nan, value)


@pytest.mark.parametrize(
    ("name", "place"), [("embed", "the embedding"), ("layers.1.ffn.out", "layer 1")]
)
def test_what_is_not_finite_in_an_early_chunk_does_not_pass(talker, name, place):
    """It comes to the later logits through the rows of the state."""
    model, tokenizer = talker
    ids, heard = tokenizer.encode(PROMPT * 12), Planted(name)
    assert len(ids) > 3 * 16

    def chunks(done, total):
        if done == 16:
            heard.name = None

    options = {"prefill_step": 16, "on_prefill": chunks}
    run = stream_generate(model, tokenizer, ids, 3, cache=model.make_cache(), **options)
    with listening(heard), pytest.raises(DataError, match="not finite numbers"):
        next(run)


def test_values_that_a_second_pass_finds_finite_are_told_of(talker):
    """As where kernels alone give them."""
    model, tokenizer = talker
    ids, state = tokenizer.encode(PROMPT), model.make_cache()
    assert "finite" in blame(model, ids, state) and state.offset == 0
    with dispatch.kernels(True):
        want = "DS4MLX_KERNELS=0" if dispatch.in_use() else "a second pass"
        assert want in blame(model, ids, state)
