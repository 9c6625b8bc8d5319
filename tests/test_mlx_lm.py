"""The model runs under mlx-lm's own generation loop, and its tokenizer under mlx-lm's wrapper."""

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ds4mlx import DataError, Sampler, encode_messages, generate, load
from ds4mlx.chat import encode_ids


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


@pytest.fixture(scope="module")
def tiny():
    """The small model, loaded without naming it."""
    return load()


def test_generate_from_text(tiny):
    model, tokenizer = tiny
    want = generate(model, tokenizer, tokenizer.encode("def add(a, b):", True), max_tokens=12)
    assert mlx_lm.generate(model, tokenizer, "def add(a, b):", max_tokens=12) == want
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Add two numbers."}])
    assert tokenizer.decode(prompt).endswith("<｜Assistant｜></think>")
    want = generate(model, tokenizer, prompt, max_tokens=12)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=12) == want


def test_a_conversation_through_mlx_lms_wrapper(tiny):
    _, tokenizer = tiny
    wrapped = TokenizerWrapper(tokenizer)
    assert wrapped.has_chat_template and wrapped.has_thinking
    messages = [{"role": "user", "content": "a <｜User｜> b"}]
    ids = wrapped.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True)
    assert ids == encode_ids(messages, tokenizer, "high")
    whole = [*messages, {"role": "assistant", "content": "c"}]
    text = wrapped.apply_chat_template(whole, tokenize=False, enable_thinking=False)
    assert text == encode_messages(whole) and text.endswith(tokenizer.eos_token)
    ids = wrapped.apply_chat_template(whole, add_generation_prompt=False, enable_thinking=False)
    assert ids == tokenizer.encode(text)


def test_a_state_says_that_it_cannot_be_trimmed(tiny):
    model, _ = tiny
    state = model.make_cache()
    model(mx.array([[1, 2, 3, 4, 5]]), cache=state)
    assert not can_trim_prompt_cache(state)
    assert trim_prompt_cache(state, 2) == 0
    assert state.offset == 5
    assert repr(state) == f"DecodeState(5 tokens, {state.nbytes:,} bytes)"


def test_temperature_and_speeds(tiny, capsys):
    model, tokenizer = tiny
    text = generate(model, tokenizer, "def f(", max_tokens=4, temp=0.0, verbose=True)
    out = capsys.readouterr().out
    assert out.startswith(text + "\nPrompt: ") and "Generation: 4 tokens, " in out
    with pytest.raises(DataError, match="exclude each other"):
        generate(model, tokenizer, "def f(", temp=1.0, sampler=Sampler(temperature=1.0))
    with pytest.raises(DataError, match="temperature"):
        generate(model, tokenizer, "def f(", temp=-1.0)
