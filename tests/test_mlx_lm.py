"""mlx-lm's own tools run on the model and its tokenizer, or there is a reason why not."""

import json
import sys
import threading
import urllib.request
from argparse import Namespace
from copy import deepcopy
from http.server import ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm import lora, perplexity, server
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import TextDataset

from ds4mlx import DataError, Sampler, encode_messages, generate, load
from ds4mlx.chat import encode_ids
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.model.fused.choice import launches
from ds4mlx.model.fused.step import step_outputs
from ds4mlx.model.linear import projections


@pytest.mark.parametrize("mode", ["exact", "kvsim"])
def test_generate_step(decoded_model, official_model, stored, mode):
    model = decoded_model if mode == "exact" else official_model
    prompt = mx.array(stored["s700/ids"][:300].astype("int32"))
    want = stored[f"greedy/{mode}/ids"].tolist()
    steps = generate_step(prompt, model, max_tokens=len(want), prefill_step_size=100)
    assert [int(token) for token, _ in steps] == want


def test_generate_step_decodes_by_launches(exact_model, stored, monkeypatch):
    """As it does on a GPU: every token after the prompt is one step of them."""
    stepped = []
    monkeypatch.setattr(
        "ds4mlx.model.model.step_outputs",
        lambda *sides: (stepped.append(len(sides[2])), step_outputs(*sides))[1],
    )
    prompt = mx.array(stored["s700/ids"][:300].astype("int32"))
    want = stored["greedy/exact/ids"].tolist()[:12]
    with launches():
        steps = generate_step(prompt, exact_model, max_tokens=len(want), prefill_step_size=100)
        assert [int(token) for token, _ in steps] == want
    assert len(stepped) >= len(want) - 1 and set(stepped) == {1}


def test_the_attributes_of_an_mlx_lm_model(exact_model):
    assert len(exact_model.layers) == exact_model.args.num_hidden_layers
    weights = {"norm.weight": mx.ones(4)}
    assert exact_model.sanitize(weights) == weights


@pytest.fixture(scope="module")
def tiny():
    """The small model, loaded without naming it, with plain values."""
    model, tokenizer = load()
    decode_weights(model)
    return model, tokenizer


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


def test_a_copied_state_goes_its_own_way(small_model):
    """mlx-lm copies the states that it keeps for prompts to come."""
    ids, state = mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), small_model.make_cache()
    small_model(ids, cache=state)
    other, again = deepcopy(state), deepcopy(state)
    want = small_model(ids, cache=state)
    assert (state.offset, other.offset) == (18, 9)
    small_model(ids[:, :2], cache=other)
    assert (small_model(ids, cache=again) == want).all()
    assert again.form is state.form


def test_perplexity(tiny):
    model, tokenizer = tiny
    text = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"
    ids = mx.array(tokenizer.encode(text)[:20]).reshape(2, 10)
    found, _ = perplexity.eval_ppl(model, ids, batch_size=2)
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    assert found == pytest.approx(mx.exp(losses.mean()).item(), rel=1e-4)


@pytest.fixture
def harness(monkeypatch):
    """mlx_lm.evaluate, which imports the two names of lm-eval that it needs; that is not installed."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = object
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda made: made
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    from mlx_lm.evaluate import MLXLM

    yield MLXLM
    sys.modules.pop("mlx_lm.evaluate", None)


def test_the_scores_of_evaluate(tiny, harness):
    """Log-likelihoods of continuations and of texts, given a model instead of a path of its own form.

    Texts of a batch would share one state, and generation merges them.
    """
    model, tokenizer = tiny
    scorer = object.__new__(harness)
    scorer._model, scorer.tokenizer = model, TokenizerWrapper(tokenizer)
    scorer._max_tokens, scorer._batch_size, scorer.use_chat_template = None, 1, False
    start, ends = "def add(a, b):\n    return", (" a + b\n", " house")
    asked = [SimpleNamespace(args=(start, end)) for end in ends]
    found = [score for score, _ in scorer.loglikelihood(asked)]
    before = len(tokenizer.encode(start, True))
    for score, end in zip(found, ends, strict=True):
        ids = mx.array([tokenizer.encode(start + end, True)])
        losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        assert score == pytest.approx(-losses[0, before - 1 :].sum().item(), rel=1e-2, abs=0.05)
    whole = [SimpleNamespace(args=(start + end,)) for end in ends]
    assert len(scorer.loglikelihood_rolling(whole)) == 2
    scorer._batch_size = 2
    with pytest.raises(DataError, match="2 sequences need 2 decode states"):
        scorer.loglikelihood_rolling(whole)
    with pytest.raises(ValueError, match="does not yet support batching"):
        batch_generate(model, scorer.tokenizer, [[1, 2], [3]], max_tokens=2)


@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_that_trains(tiny_to_train, tmp_path, checkpoint, monkeypatch):
    """All of `mlx_lm.lora` but its loader; what it writes is read by ours."""
    model, tokenizer = tiny_to_train
    monkeypatch.setattr(type(model.layers[0]), "__call__", type(model.layers[0]).__call__)
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.1, "keys": ["attn.wkv", "ffn.experts.w2"]}
    args = {**lora.CONFIG_DEFAULTS, "lora_parameters": parameters, "grad_checkpoint": checkpoint}
    args |= {"iters": 1, "batch_size": 2, "num_layers": 1, "val_batches": 1, "learning_rate": 1e-3}
    args["adapter_path"] = str(tmp_path)
    data = TextDataset([{"text": f"House {n} is red.\n"} for n in range(2)], tokenizer)
    mx.disable_compile()  # whose CPU back-end takes minutes
    try:
        lora.train_model(SimpleNamespace(**args), model, data, data)
    finally:
        mx.enable_compile()
    model.eval()
    loaded = load(dtype=mx.float32, adapter=tmp_path)[0]
    adapted = {name for name, matrix in projections(loaded).items() if matrix.adapted}
    assert adapted == {f"layers.4.{key}" for key in parameters["keys"]}
    assert (loaded(mx.array([[1, 2, 3]])) == model(mx.array([[1, 2, 3]]))).all()


@pytest.fixture
def tiny_to_train():
    """The small model for a test that changes it."""
    return load(dtype=mx.float32)


def test_what_cannot_be_an_adapter_here(tiny_to_train):
    model, _ = tiny_to_train
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["attn.wkv"]}
    with pytest.raises(ValueError, match="Can't convert layer of type Linear"):
        lora.linear_to_lora_layers(model, 1, parameters, use_dora=True)


class Provider(server.ModelProvider):
    """mlx-lm's provider of models with another loader."""

    def _load(self, model_path, adapter_path=None, draft_model_path=None):
        self.model, tokenizer = load(model_path, adapter=adapter_path)
        self.tokenizer = TokenizerWrapper(tokenizer)
        self.model_key = (model_path, adapter_path, draft_model_path)


@pytest.fixture
def served(embedded_dir):
    """Asks mlx-lm's server, by HTTP."""
    options = Namespace(
        model=str(embedded_dir), adapter_path=None, draft_model=None, trust_remote_code=False,
        pipeline=False, chat_template=None, use_default_chat_template=False, chat_template_args={},
        kv_bits=None, kv_group_size=64, quantized_kv_start=0, prefill_step_size=512,
        num_draft_tokens=3, decode_concurrency=4, prompt_concurrency=4, prompt_cache_bytes=None,
        allowed_origins=["*"], temp=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=20,
    )  # fmt: skip
    answers = server.ResponseGenerator(Provider(options), server.LRUPromptCache(4))
    handler = lambda *args: server.APIHandler(answers, *args)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()

        def ask(path, **body):
            url = f"http://127.0.0.1:{http.server_port}/v1/{path}"
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            return json.loads(urllib.request.urlopen(request, timeout=100).read())

        yield ask
        http.shutdown()
    answers.stop_and_join()


def test_the_server(tiny, served):
    """A prompt that goes on from an answer is read from where that ended."""
    model, tokenizer = tiny
    prompt = "def add(a, b):\n    return a"
    first = served("completions", prompt=prompt, max_tokens=8)
    text = first["choices"][0]["text"]
    ids = tokenizer.encode(prompt)
    assert text == mlx_lm.generate(model, tokenizer, ids, max_tokens=8)
    more = served("completions", prompt=f"{prompt}{text}\n", max_tokens=2)
    assert more["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    messages = [{"role": "user", "content": "Add two numbers."}]
    answer = served("chat/completions", messages=messages, max_tokens=8)["choices"][0]["message"]
    assert answer["role"] == "assistant" and (answer["content"] or answer["reasoning"])
