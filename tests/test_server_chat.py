"""chat.completions and models, asked by OpenAI's own client."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import openai
import pytest
import serving
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ds4mlx.server.answering import KeepAlive, paced

QUESTION = [{"role": "user", "content": "Write a function that adds two numbers."}]
GREEDY = {"model": "any", "messages": QUESTION, "temperature": 0, "max_tokens": 60}
PLAIN = GREEDY | {"reasoning_effort": "none"}
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string", "enum": ["a.py", "b.py"]}},
            "required": ["path"],
        },
    },
}
OTHER = {"type": "function", "function": {"name": "list_files", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client(served):
    return of(served)


@pytest.fixture(scope="module")
def chatter(endless):
    return of(endless)


def of(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": serving.PATIENCE} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


def events(server, path, body):
    """The data of a stream's events, and its comments."""
    status, headers, raw = server.ask("POST", path, body | {"stream": True})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    lines = raw.decode().splitlines()
    assert all(not line or line.startswith(("data: ", ":")) for line in lines)
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def joined(chunks):
    """Content, reasoning, calls and finish reason of a stream's chunks."""
    content = reasoning = ""
    calls, finish = [], None
    for chunk in chunks:
        for choice in chunk.choices:
            delta, finish = choice.delta, choice.finish_reason or finish
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            for part in delta.tool_calls or ():
                if part.index == len(calls):
                    calls.append({"id": part.id, "name": part.function.name, "arguments": ""})
                calls[part.index]["arguments"] += part.function.arguments or ""
    return content, reasoning, calls, finish


def test_a_stream_is_the_whole_answer(client, served):
    """Each event is a chunk by the SDK's types; role first, then the end, usage and [DONE]."""
    whole = client.chat.completions.create(**GREEDY)
    asked = GREEDY | {"stream_options": {"include_usage": True}}
    *data, done = events(served, "/v1/chat/completions", asked)
    chunks = [ChatCompletionChunk.model_validate_json(each, strict=True) for each in data]
    message = whole.choices[0].message
    assert joined(chunks) == (message.content, message.reasoning_content, [], "stop")
    assert message.content.startswith("```python\ndef add") and message.reasoning_content
    assert done == "[DONE]" and chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert not chunks[-2].choices[0].delta.model_dump(exclude_none=True)
    for usage in (whole.usage, chunks[-1].usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
        assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens
    assert {"source", "prompt_tps", "generation_tps"} == set(json.loads(data[-1])["ds4mlx"])
    ChatCompletion.model_validate(whole.model_dump(), strict=True)


@pytest.mark.parametrize(
    "knob",
    [
        {"reasoning_effort": "none"},
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning": {"enabled": False}},
    ],
)
def test_thinking_is_turned_off_by_every_knob(client, knob):
    answer = client.chat.completions.create(**GREEDY, extra_body=knob)
    assert not getattr(answer.choices[0].message, "reasoning_content", None)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_is_taken_back(client):
    first = client.chat.completions.create(**GREEDY).choices[0].message
    history = [*QUESTION, first.model_dump(), {"role": "user", "content": "Subtract them."}]
    answer = client.chat.completions.create(**GREEDY | {"messages": history})
    assert answer.choices[0].finish_reason == "stop"


def test_a_thinking_budget(chatter):
    asked = {"model": "x", "messages": QUESTION, "max_tokens": 12, "seed": 1}
    answer = chatter.chat.completions.create(**asked, extra_body={"thinking_budget": 4})
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 5
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"


def test_the_reasoning_of_a_running_answer_is_ended(chatter, endless):
    with chatter.chat.completions.create(model="x", messages=QUESTION, stream=True) as stream:
        for chunk in stream:
            if getattr(chunk.choices[0].delta, "reasoning_content", None):
                break
        path = f"/v1/chat/completions/{chunk.id}/end_thinking"
        assert endless.json("POST", path, {})[0] == 200
        assert any(chunk.choices[0].delta.content for chunk in stream)
    assert endless.json("POST", "/v1/chat/completions/other/end_thinking", {})[0] == 404


def test_stops_seeds_and_limits(client):
    ask = client.chat.completions.create
    stopped = ask(**GREEDY | {"stop": ["return", "never"]}).choices[0]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == "return"
    assert "return" not in stopped.message.content
    limited = ask(**GREEDY | {"max_completion_tokens": 3})
    assert (limited.usage.completion_tokens, limited.choices[0].finish_reason) == (3, "length")
    nothing = ask(**GREEDY | {"max_tokens": 0})
    assert (nothing.usage.completion_tokens, nothing.choices[0].finish_reason) == (0, "length")
    drawn = [
        ask(**GREEDY | {"temperature": 2, "seed": seed, "max_tokens": 20}).choices[0].message
        for seed in (-5, -5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_way_of_drawing_is_taken(client):
    answer = client.chat.completions.create(
        **GREEDY | {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4, "frequency_penalty": 0.5},
        presence_penalty=-0.5,
        seed=3,
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    assert answer.usage.completion_tokens == 4


def test_logprobs(client, served):
    asked = PLAIN | {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    tokens = whole.logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text.startswith(whole.message.content)
    assert all(t.top_logprobs[0].logprob == t.logprob <= 0 for t in tokens)  # as it is greedy
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    data = events(served, "/v1/chat/completions", asked)[:-1]
    chunks = [ChatCompletionChunk.model_validate_json(each) for each in data]
    said = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [each.token for part in said for each in part] == [token.token for token in tokens]


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "sum",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"sum": {"type": "integer", "enum": [1, 2]}},
                    "required": ["sum"],
                    "additionalProperties": False,
                },
            },
        },
    ],
)
def test_answers_in_json(client, form):
    asked = PLAIN | {"response_format": form, "max_tokens": 40}
    choice = client.chat.completions.create(**asked).choices[0]
    if choice.finish_reason == "stop":
        value = json.loads(choice.message.content)
        assert isinstance(value, dict)
        assert form["type"] == "json_object" or value["sum"] in (1, 2)
    else:
        assert form["type"] == "json_object" and choice.finish_reason == "length"


def test_a_schema_is_about_an_answer_with_its_beginning(client):
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}

    def ask(begun):
        talk = [*QUESTION, {"role": "assistant", "content": begun, "prefix": True}]
        asked = PLAIN | {"messages": talk, "response_format": form}
        return client.chat.completions.create(**asked).choices[0]

    for begun in ("{", '{"sum"', [{"type": "text", "text": '{"sum": '}]):
        answer, text = ask(begun), begun if isinstance(begun, str) else begun[0]["text"]
        assert answer.finish_reason == "stop"
        assert json.loads(text + answer.message.content)["sum"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="obeys the JSON schema") as refused:
        ask("The sum is")
    assert refused.value.code == "invalid_value"


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "king"),
        ({"messages": "x"}, 400, "messages"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n must"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"tool_choice": "sometimes"}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "none is offered"),
        ({"tool_choice": {"type": "allowed_tools"}}, 400, "a list of tools"),
        ({"tools": [TOOL, TOOL]}, 400, "read_file"),
        ({"tools": [TOOL, {"type": "custom", "custom": {"name": "read_file"}}]}, 400, "read_file"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0 needs a function"),
        ({"tools": [TOOL, {"type": "custom", "custom": {}}]}, 400, "tools.1.custom needs a name"),
        ({"reasoning_effort": "some"}, 400, "some"),
        ({"response_format": {"type": "xml"}}, 400, "xml"),
    ],
)
def test_refusals_name_what_is_wrong(client, change, status, word):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**GREEDY | change)
    assert refused.value.status_code == status and word in refused.value.message
    assert refused.value.body["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long(client):
    most = client.models.retrieve("ds4-tiny").context_window
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="x", prompt=[5] * (most + 7))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    assert f"prompt is too long: {most + 7} tokens > {most - 1} maximum" in refused.value.message
    assert f"maximum context length is {most - 1} tokens" in refused.value.message
    words = [{"role": "user", "content": "x = 1\n" * most}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="x", messages=words)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_models(client):
    (model,) = client.models.list().data
    assert Model.model_validate(model.model_dump(), strict=True).id == "ds4-tiny"
    assert client.models.retrieve("ds4-tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.chat.completions.create(**GREEDY | {"max_tokens": 1}).model == "any"


def test_models_for_the_other_protocol(served):
    status, listed = served.json("GET", "/v1/models", anthropic_version="2023-06-01")
    assert status == 200 and listed["first_id"] == listed["data"][0]["id"] == "ds4-tiny"
    assert listed["data"][0]["type"] == "model" and not listed["has_more"]
    status, error = served.json("GET", "/v1/models/x", anthropic_version="2023-06-01")
    assert (status, error["error"]["type"]) == (404, "not_found_error")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_line_of_the_page_ends_a_thought(chatter, endless):
    page = (Path(__file__).parents[1] / "docs" / "server.md").read_text()
    line = re.search(r"^```bash\n(curl .*?end_thinking.*?)```", page, re.DOTALL | re.MULTILINE)[1]
    line = line.replace("http://127.0.0.1:8765", endless.url)
    with chatter.chat.completions.create(model="x", messages=QUESTION, stream=True) as stream:
        known = os.environ | {"ID": next(iter(stream)).id}
        done = subprocess.run(["bash", "-c", line], capture_output=True, env=known, check=True)
        assert json.loads(done.stdout)["ended"]
    is_idle(endless)


def test_a_full_queue_says_when_to_come_back(chatter, endless):
    streams = [
        chatter.chat.completions.create(model="x", messages=QUESTION, stream=True) for _ in range(3)
    ]
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            chatter.chat.completions.create(model="x", messages=QUESTION)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert endless.json("GET", "/health")[1]["status"] == "ok"
        assert b"ds4mlx_running" in endless.ask("GET", "/metrics")[2]
    finally:
        for stream in streams:
            stream.close()
    is_idle(endless)


def test_answers_that_are_not_waited_for_end(chatter, endless):
    """A stream that is closed, and a whole answer whose client leaves."""
    with chatter.chat.completions.create(model="x", messages=QUESTION, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        chatter.with_options(timeout=0.2).chat.completions.create(model="x", messages=QUESTION)
    is_idle(endless)


def test_what_is_refused_is_not_begun(chatter, endless):
    with pytest.raises(openai.BadRequestError, match="echo needs a prompt that is text"):
        chatter.completions.create(model="x", prompt=[5], echo=True, max_tokens=10_000)
    is_idle(endless)


def is_idle(server):
    """Ask how the server does until it does nothing; each answer of its own takes it a while."""
    for _ in range(10_000):
        told = server.json("GET", "/health")[1]
        if told["running"] == told["waiting"] == 0 and not server.app.state.service.turns:
            return
    raise AssertionError(f"the server goes on: {told}")


def test_signs_of_life_come_between_events():
    async def slow(asked):
        for number in range(2):
            await asked.wait()
            asked.clear()
            yield number

    async def read():
        asked, seen = asyncio.Event(), []
        async for event in paced(slow(asked), 0.001):
            seen.append(event)
            if seen[-2:] == [KeepAlive(), KeepAlive()]:
                asked.set()
        return seen

    seen = asyncio.run(read())
    assert [event for event in seen if not isinstance(event, KeepAlive)] == [0, 1]
    assert seen[:2] == [KeepAlive(), KeepAlive()]
