"""Anthropic's Messages, asked by Anthropic's own client."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

import anthropic
import pytest
import serving
from anthropic.types import Message
from wire_formats import message_of, sse

from ds4mlx.server import answering

ADD = {"role": "user", "content": "Write a function that adds two numbers."}
GREEDY = {"model": "claude-any", "messages": [ADD], "max_tokens": 40}
COLD = {"extra_body": {"temperature": 0}}
THINKING = {"type": "enabled", "budget_tokens": 6}
READ = {
    "name": "read_file",
    "description": "Reads a file.",
    "input_schema": {
        "type": "object",
        "properties": {"path": {"type": "string", "enum": ["a.py", "b.py"]}},
        "required": ["path"],
    },
}
NAMED = {"type": "tool", "name": "read_file"}


@pytest.fixture(scope="module")
def client(served):
    return of(served)


def of(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": serving.PATIENCE} | options
    return anthropic.Anthropic(base_url=server.url, **options)


def ask(client, **changes):
    return client.messages.create(**GREEDY | COLD | changes)


def events(server, **changes):
    """The events of a stream; each has the name that its data says."""
    body = GREEDY | {"temperature": 0, "stream": True} | changes
    status, headers, raw = server.ask("POST", "/v1/messages?beta=true", body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    found = list(sse(raw.decode().split("\n")))
    assert all(name == data["type"] for name, data in found)
    return [data for _, data in found]


def prompt_tokens(message):
    usage = message.usage
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def counted(client, **asked):
    asked = {"model": "any", "messages": [ADD]} | asked
    return client.messages.count_tokens(**asked).input_tokens


def test_an_answer_and_what_it_took(client):
    message = ask(client)
    (block,) = message.content
    assert block.type == "text" and "def add" in block.text
    assert (message.model, message.role) == ("claude-any", "assistant")
    assert prompt_tokens(message) == counted(client)
    Message.model_validate(message.model_dump())


def test_a_stream_is_the_whole_answer(client, served):
    asked = {"thinking": THINKING, "max_tokens": 30}
    whole = ask(client, **asked)
    made = message_of(events(served, **asked))
    assert made["content"] == [block.model_dump(exclude_unset=True) for block in whole.content]
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.usage.output_tokens_details.thinking_tokens <= 8
    assert made["stop_reason"] == whole.stop_reason
    with client.messages.stream(**GREEDY | COLD | asked) as stream:
        texts = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert texts == whole.content[-1].text
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0] == whole.content[0]
    assert prompt_tokens(final) == prompt_tokens(whole) == counted(client, thinking=THINKING)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_thought_that_is_not_shown(client):
    asked = {"thinking": THINKING | {"display": "omitted"}, "max_tokens": 15}
    hidden, shown = ask(client, **asked), ask(client, max_tokens=15, thinking=THINKING)
    assert hidden.content[0].thinking == "" and shown.content[0].thinking
    assert hidden.content[1:] == shown.content[1:]

    def history(message):
        return [ADD, message.to_param(), ADD]

    tools = {"thinking": THINKING, "tools": [READ]}
    one = counted(client, messages=history(hidden), **tools)
    assert one == counted(client, messages=history(shown), **tools)


@pytest.mark.parametrize("turns", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_tools_over_several_turns(client, turns):
    """Every turn is read on from where the last one ended: thoughts and calls are as sampled."""
    messages, known = [ADD], 0
    choice = {"tool_choice": NAMED | {"disable_parallel_tool_use": True}, "max_tokens": 60}
    for turn in range(turns):
        moved = [READ | {"cache_control": {"type": "ephemeral"}}] if turn % 2 else [READ]
        asked = {"messages": messages, "thinking": THINKING}
        answer = ask(client, tools=moved, **asked, **choice)
        thought, call = answer.content
        assert thought.type == "thinking" and thought.signature
        assert answer.stop_reason == "tool_use" and call.name == "read_file"
        assert call.input["path"] in ("a.py", "b.py") and len(call.input) == 1
        assert answer.usage.cache_read_input_tokens >= known - 1
        assert prompt_tokens(answer) == counted(client, tools=[READ], **asked)
        known = prompt_tokens(answer) + answer.usage.output_tokens
        result = {"type": "tool_result", "tool_use_id": call.id, "content": f"line {turn}"}
        messages = [*messages, answer.to_param(), {"role": "user", "content": [result]}]
    none = {"tool_choice": {"type": "none"}, "max_tokens": 8}
    text = ask(client, messages=messages, tools=[READ], **none)
    assert [block.type for block in text.content] == ["text"]


def test_a_call_is_streamed_name_first(served):
    made = events(served, tools=[READ], tool_choice=NAMED)
    kinds = [event["type"] for event in made]
    start = made[kinds.index("content_block_start")]
    assert start["content_block"]["name"] == "read_file"
    parts = [e["delta"]["partial_json"] for e in made if e["type"] == "content_block_delta"]
    assert len(parts) > 1
    (call,) = message_of(made)["content"]
    assert call["id"] == start["content_block"]["id"] and call["input"]["path"]


def test_an_answer_in_a_form(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = ask(client, output_config=form)
    assert re.fullmatch(r'\s*\{\s*"n"\s*:\s*[12]\s*\}\s*', message.content[0].text)
    assert message.stop_reason == "end_turn"
    begun = {"role": "assistant", "content": '{"n":'}
    message = ask(client, messages=[ADD, begun], output_config=form)
    assert re.fullmatch(r"\s*[12]\s*\}\s*", message.content[0].text)
    begun["content"] = "Here it is:"
    with pytest.raises(anthropic.BadRequestError, match="cannot go on to one that obeys"):
        ask(client, messages=[ADD, begun], output_config=form)


def test_why_answers_end(client):
    stopped = ask(client, stop_sequences=["return"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "return")
    assert "return" not in stopped.content[0].text
    assert ask(client, max_tokens=3).stop_reason == "max_tokens"
    nothing = ask(client, max_tokens=0)
    assert nothing.content == [] and nothing.usage.output_tokens == 0


def test_a_call_that_is_cut_is_left_out(client, served):
    asked = {"tools": [READ], "tool_choice": NAMED}
    for most in (14, 24):
        message = ask(client, **asked, max_tokens=most)
        assert (message.stop_reason, message.content) == ("max_tokens", [])
        assert message_of(events(served, **asked, max_tokens=most))["content"] == []


def test_the_beginning_of_an_answer_is_gone_on_from(client):
    begun = {"role": "assistant", "content": "```python\ndef add("}
    message = ask(client, messages=[ADD, begun], max_tokens=10)
    assert not message.content[0].text.startswith("```")


def test_a_prompt_that_is_too_long_says_by_how_much(embedded):
    words = {"role": "user", "content": "x = 1\n" * 100}
    with serving.serving(*embedded, context=100) as server:
        client = of(server)
        with pytest.raises(anthropic.BadRequestError) as caught:
            ask(client, messages=[words])
        count = counted(client, messages=[words])
        assert ask(client, max_tokens=200).stop_reason in ("end_turn", "max_tokens")
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert f"prompt is too long: {count} tokens > 99 maximum" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"max_tokens": -1},
        {"tool_choice": NAMED},
        {"tools": [{"input_schema": {}}]},
        {"thinking": {"type": "sometimes"}},
        {"output_config": {"effort": "heroic"}, "thinking": THINKING},
    ],
)
def test_what_is_wrong_is_refused_in_the_protocol_s_shape(client, wrong):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **wrong)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == caught.value.response.headers["request-id"]


def test_a_client_that_leaves_frees_its_place(endless):
    client = of(endless)
    turns = endless.app.state.service.turns
    with client.messages.stream(**GREEDY | {"max_tokens": 30000}) as stream:
        next(iter(stream))
        assert len(turns) == 1
    serving.until(lambda: not turns and endless.app.state.service.scheduler.status().running == 0)


async def gone_after_a_moment(url):
    client = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=0.3)
    with pytest.raises(anthropic.APITimeoutError):
        await client.messages.create(**GREEDY | {"max_tokens": 20000})


def test_a_client_that_leaves_a_whole_answer_frees_its_place(endless):
    asyncio.run(gone_after_a_moment(endless.url))
    service = endless.app.state.service
    serving.until(lambda: not service.turns and service.scheduler.status().running == 0)


def test_a_sign_of_life_where_nothing_comes(served, monkeypatch):
    monkeypatch.setattr(answering, "KEEP_ALIVE", 0.001)
    made = events(served, max_tokens=5)
    assert {"type": "ping"} in made and message_of(made)["content"]


def test_a_server_that_stops_says_so_in_the_stream(talker):
    """Both kinds of answers end with their protocol's own error."""
    body = {"model": "any", "stream": True, "max_tokens": 30000, "messages": [ADD]}
    other = {"model": "any", "stream": True, "input": ADD["content"]}
    with serving.serving(*talker) as server, ThreadPoolExecutor() as pool:
        asked = [("/v1/messages", body), ("/v1/responses", other)]
        answers = [pool.submit(server.ask, "POST", *each) for each in asked]
        scheduler = server.app.state.service.scheduler
        serving.until(lambda: scheduler.status().running == 2)
        scheduler.close(serving.PATIENCE)
        messages, responses = (
            list(sse(answer.result()[2].decode().split("\n"))) for answer in answers
        )
    name, error = messages[-1]
    assert name == "error" and error["error"]["type"] == "overloaded_error"
    name, failed = responses[-1]
    assert name == "response.failed" and "stopping" in failed["response"]["error"]["message"]
