"""Completions of plain texts, asked by OpenAI's own client."""

import json

import pytest
from openai.types import Completion
from test_server_chat import events, of


@pytest.fixture(scope="module")
def client(served):
    return of(served)


def test_completions(client, served):
    asked = {"model": "x", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
    told = client.completions.create(**asked, logprobs=2).choices[0]
    whole = client.completions.create(**asked, echo=True)
    choice = Completion.model_validate(whole.model_dump(), strict=True).choices[0]
    assert choice.text == "def add(a, b):" + "".join(told.logprobs.tokens)
    assert choice.finish_reason == "length" and whole.usage.completion_tokens == 12
    *data, done = events(served, "/v1/completions", asked | {"echo": True})
    ends = [json.loads(each)["choices"][0]["finish_reason"] for each in data]
    assert ends == [None] * (len(data) - 1) + ["length"]
    data = [each.replace('"finish_reason":null', '"finish_reason":"length"') for each in data]
    chunks = [Completion.model_validate_json(each, strict=True) for each in data]
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text and done == "[DONE]"


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("prompt", ["def add(a, b):", "🐍🐍🐍🐍🐍🐍"])
def test_the_tokens_of_a_text_stand_where_they_are_in_it(client, served, prompt, is_held):
    """Also in a stream of which the end of each token is held back, as a stop text may begin there."""
    asked = {"model": "x", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    asked |= {"logprobs": 0}
    whole = client.completions.create(**asked).choices[0]
    if is_held:
        asked["stop"] = [f"{letter}\a" for letter in {*whole.text}][:64]
    chunks = [json.loads(data) for data in events(served, "/v1/completions", asked)[:-1]]
    parts = [chunk["choices"][0]["logprobs"] or {"text_offset": []} for chunk in chunks]
    offsets = whole.logprobs.text_offset
    assert offsets == [at for part in parts for at in part["text_offset"]]
    assert offsets[0] == 0 and offsets[-1] < len(whole.text)
    for at, token in zip(offsets, whole.logprobs.tokens, strict=True):
        assert "\ufffd" in token or whole.text.startswith(token, at)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_an_echo_are_refused(served, stream):
    """A prompt's are not computed, and an answer without them would look as if they were there."""
    asked = {"prompt": "def f(", "max_tokens": 1, "echo": True, "logprobs": 0, "stream": stream}
    status, told = served.json("POST", "/v1/completions", asked)
    assert (status, told["error"]["param"]) == (400, "logprobs")
    assert "not supported together with echo" in told["error"]["message"]


def test_texts_of_clients_open_no_turn(client):
    """A special token in a text is as many tokens as its letters make."""
    counts = [
        client.completions.create(model="x", prompt=text, max_tokens=0).usage.prompt_tokens
        for text in ("<｜User｜>", "</think>")
    ]
    assert min(counts) > 2
