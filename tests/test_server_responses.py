"""OpenAI's Responses, asked by OpenAI's own client and by an agent that stands on them."""

import asyncio
import json

import agents
import openai
import pytest
import serving
from openai.types.responses import Response
from wire_formats import response_of, sse

from ds4mlx.server import answering

ADD = "Write a function that adds two numbers."
GREEDY = {"model": "gpt-any", "input": ADD, "temperature": 0, "max_output_tokens": 40}
SHORT = {"reasoning": {"effort": "high", "max_tokens": 6}}
PLAIN = {"reasoning": {"effort": "none"}}
READ = {
    "type": "function",
    "name": "read_file",
    "description": "Reads a file.",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string", "enum": ["a.py", "b.py"]}},
        "required": ["path"],
        "additionalProperties": False,
    },
    "strict": True,
}
NAMED = {"type": "function", "name": "read_file"}


@pytest.fixture(scope="module")
def client(served):
    return of(served)


def of(server, kind=openai.OpenAI, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": serving.PATIENCE} | options
    return kind(base_url=f"{server.url}/v1", **options)


def ask(client, **changes):
    return client.responses.create(**GREEDY | PLAIN | changes)


def events(server, **changes):
    """The events of a stream; each has the name that its data says."""
    body = GREEDY | PLAIN | {"stream": True} | changes
    status, _, raw = server.ask("POST", "/v1/responses", body)
    assert status == 200
    found = list(sse(raw.decode().split("\n")))
    assert all(name == data["type"] for name, data in found)
    return [data for _, data in found]


def dumped(response):
    return [item.model_dump(exclude_unset=True) for item in response.output]


def without_ids(items):
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def test_an_answer_and_what_it_took(client):
    response = ask(client)
    assert "def add" in response.output_text and response.model == "gpt-any"
    usage = response.usage
    asked = {"model": "any", "input": ADD, **PLAIN}
    assert usage.input_tokens == client.responses.input_tokens.count(**asked).input_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    Response.model_validate(response.model_dump())
    again = ask(client, max_output_tokens=4)
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert again.usage.input_tokens == usage.input_tokens


def test_a_stream_is_the_whole_answer(client, served):
    asked = SHORT | {"max_output_tokens": 60}
    whole = ask(client, **asked)
    made = response_of(events(served, **asked))
    assert without_ids(made["output"]) == without_ids(dumped(whole))
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert made["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    with client.responses.stream(**GREEDY | asked) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text


def test_a_response_is_kept_gone_on_from_and_forgotten(client):
    first = ask(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=8)
    found = client.responses.retrieve(first.id)
    assert found.model_dump() == first.model_dump()
    second = ask(client, input="Again.", previous_response_id=first.id, max_output_tokens=8)
    inputs = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in inputs] == [ADD, first.output_text, "Again."]
    history = [{"role": "user", "content": ADD}, *dumped(first)]
    stateless = [*history, {"role": "user", "content": "Again."}]
    assert (
        ask(client, input=stateless, store=False, max_output_tokens=8).output_text
        == second.output_text
    )
    client.responses.delete(first.id)
    for gone in (first.id, "resp_0"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(gone)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, previous_response_id=gone)
        assert caught.value.code == "previous_response_not_found"
    third = ask(client, input="Go on.", previous_response_id=second.id, max_output_tokens=8)
    assert len(client.responses.input_items.list(third.id).data) == 5


def test_a_response_that_is_not_stored_is_not_kept(client, served):
    brief = {"store": False, "max_output_tokens": 4}
    for response in (ask(client, **brief).id, response_of(events(served, **brief))["id"]):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response)
    streamed = response_of(events(served, max_output_tokens=4))
    assert client.responses.retrieve(streamed["id"]).output_text


@pytest.mark.parametrize("turns", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_tools_over_several_turns(client, turns):
    """Thoughts come back unseen, arguments spaced otherwise; each turn goes on from the last."""
    items, known = [{"role": "user", "content": ADD}], 0
    asked = {"tools": [READ], "tool_choice": NAMED, "max_output_tokens": 60, "store": False}
    asked |= SHORT | {"include": ["reasoning.encrypted_content"]}
    for turn in range(turns):
        answer = ask(client, input=items, **asked)
        thought, call = dumped(answer)
        assert thought["type"] == "reasoning" and thought["encrypted_content"]
        assert call["name"] == "read_file" and set(json.loads(call["arguments"])) == {"path"}
        assert answer.usage.input_tokens_details.cached_tokens >= known - 1
        known = answer.usage.total_tokens
        del thought["content"]
        call["arguments"] = json.dumps(json.loads(call["arguments"]), separators=(",", ":"))
        output = {"type": "function_call_output", "call_id": call["call_id"]}
        items = [*items, thought, call, output | {"output": f"line {turn}"}]
    last = ask(client, input=items, tools=[READ], tool_choice="none", max_output_tokens=8)
    assert last.output_text and [item.type for item in last.output] == ["message"]


def test_tools_of_other_kinds_come_back_as_they_are(client, served):
    inner = [{key: READ[key] for key in ("type", "name", "parameters")}]
    tools = [{"type": "namespace", "name": "files", "description": "Files.", "tools": inner}]
    tools += [{"type": "custom", "name": "patch"}, {"type": "web_search"}]
    choice = {"type": "function", "name": "read_file", "namespace": "files"}
    made = response_of(events(served, tools=tools, tool_choice=choice))
    (call,) = made["output"]
    assert (call["namespace"], call["name"]) == ("files", "read_file")
    custom = {"tools": tools, "tool_choice": {"type": "custom", "name": "patch"}}
    made = response_of(events(served, **custom))
    assert made["output"][0]["type"] == "custom_tool_call" and made["output"][0]["name"] == "patch"
    history = [{"role": "user", "content": ADD}, call]
    history.append({"type": "function_call_output", "call_id": call["call_id"], "output": "x"})
    assert ask(
        client, input=history, tools=tools, tool_choice="none", max_output_tokens=4
    ).output_text


def test_an_answer_in_a_form(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    response = ask(client, text=form)
    assert json.loads(response.output_text)["n"] in (1, 2)
    assert response.text.format.name == "n"
    anything = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=10)
    assert anything.output_text.lstrip().startswith("{")


def test_logprobs(client):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(client, max_output_tokens=5, **asked)
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries).startswith(response.output_text)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


def test_an_answer_that_is_cut_says_so(client):
    response = ask(client, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_prompt_that_is_too_long_says_so(embedded):
    short = serving.serving(*embedded, context=100)
    with short as server, pytest.raises(openai.BadRequestError) as caught:
        ask(of(server), input="x = 1\n" * 100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    assert "> 99 maximum" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": 3},
        {"input": [{"role": "nobody", "content": "x"}]},
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 3}]},
        {"input": [{"type": "item_reference", "id": "msg_0"}]},
        {"input": []},
        {"tool_choice": NAMED},
        {"tool_choice": "sometimes"},
        {"reasoning": {"effort": "heroic"}},
        {"background": True},
        {"conversation": "conv_1"},
        {"max_output_tokens": -1},
    ],
)
def test_what_is_wrong_is_refused_in_the_protocol_s_shape(client, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **wrong)
    assert caught.value.body["message"] and caught.value.body["type"] == "invalid_request_error"


def test_a_sign_of_life_where_nothing_comes(served, monkeypatch):
    monkeypatch.setattr(answering, "KEEP_ALIVE", 0.001)
    made = events(served, max_output_tokens=5)
    assert [event["type"] for event in made].count("response.in_progress") > 1
    assert response_of(made)["output"]


def test_a_client_that_leaves_frees_its_place(endless):
    turns = endless.app.state.service.turns
    asked = GREEDY | {"max_output_tokens": 30000, "stream": True}
    with of(endless).responses.create(**asked) as stream:
        next(iter(stream))
        assert len(turns) == 1
    serving.until(lambda: not turns and endless.app.state.service.scheduler.status().running == 0)


def test_an_agent_that_stands_on_responses(served, tmp_path):
    """The framework runs the loop: a tool is called, its result read, and an answer given."""
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").write_text("x = 2")
    opened = []

    @agents.function_tool
    def read_file(path: str) -> str:
        """Reads a file."""
        opened.append(path)
        return (tmp_path / path).read_text() if path in ("a.py", "b.py") else "no such file"

    async def main():
        agents.set_tracing_disabled(True)
        model = agents.OpenAIResponsesModel("any", of(served, openai.AsyncOpenAI))
        settings = agents.ModelSettings(temperature=0, max_tokens=60, tool_choice="read_file")
        agent = agents.Agent(
            "reader",
            instructions="Read a file.",
            model=model,
            tools=[read_file],
            model_settings=settings,
        )
        run = agents.Runner.run_streamed(agent, ADD, max_turns=4)
        kinds = [event.type async for event in run.stream_events()]
        return run, kinds

    run, kinds = asyncio.run(main())
    assert opened and "run_item_stream_event" in kinds and "raw_response_event" in kinds
    assert isinstance(run.final_output, str)
    assert run.context_wrapper.usage.requests >= 2
    assert run.context_wrapper.usage.input_tokens_details.cached_tokens > 0
