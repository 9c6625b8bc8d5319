"""Tools in chat.completions, asked by OpenAI's own client: which are called, and how calls are told."""

import itertools
import json

import openai
import pytest
from test_server_chat import OTHER, PLAIN, QUESTION, TOOL, events, joined, of

from ds4mlx.chat import encode_messages

PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Changes a file."}}


@pytest.fixture(scope="module")
def client(served):
    return of(served)


@pytest.mark.parametrize("turns", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_tool_loop_of_several_turns(client, served, turns):
    """Calls come by name and fragments, and their history is known, token for token."""
    messages, cached = list(QUESTION), []
    for turn in range(turns):
        asked = PLAIN | {"messages": messages, "tools": [TOOL]}
        asked |= {"tool_choice": "required", "parallel_tool_calls": False}
        with client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        content, reasoning, calls, finish = joined(chunks)
        assert finish == "tool_calls" and not content and len(calls) == 1
        assert json.loads(calls[0]["arguments"])["path"] in ("a.py", "b.py")
        used = chunks[-1].usage
        cached.append((used.prompt_tokens_details.cached_tokens, used.prompt_tokens))
        messages.append(spoken(reasoning, calls))
        messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": f"# {turn}"})
    assert all(now[0] >= before[1] for before, now in itertools.pairwise(cached))
    prompt = encode_messages(messages, "none", [TOOL])
    sampled = encode_messages(messages, "none", [TOOL], replay=replay(served))
    assert sampled == prompt  # masked calls are official ones


def replay(server):
    return server.app.state.service.scheduler.replay


def spoken(reasoning, calls):
    """An answer as a client sends it back: its arguments spaced in another way."""
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": json.dumps(json.loads(call["arguments"]), separators=(",", ":")),
            },
        }
        for call in calls
    ]
    return {"role": "assistant", "content": "", "reasoning_content": reasoning, "tool_calls": calls}


def test_the_choice_of_tools_is_obeyed(client):
    named = {"type": "function", "function": {"name": "list_files"}}
    asked = PLAIN | {"tools": [TOOL, OTHER], "max_tokens": 30}
    choice = client.chat.completions.create(**asked, tool_choice=named).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("list_files", "tool_calls")
    free = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert not free.message.tool_calls and free.message.content


@pytest.mark.parametrize("mode", ["required", "auto"])
def test_only_tools_that_are_allowed_are_called(client, mode):
    """The prompt offers all of them, so that it stays the same."""
    some = [{"type": "function", "function": {"name": "list_files"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": some}}
    asked = PLAIN | {"tools": [TOOL, OTHER]}
    asked["messages"] = [{"role": "user", "content": "List the files."}]
    free = client.chat.completions.create(**asked, tool_choice="auto")
    kept = client.chat.completions.create(**asked, tool_choice=allowed)
    assert kept.usage.prompt_tokens == free.usage.prompt_tokens
    free, kept = (answer.choices[0].message.tool_calls for answer in (free, kept))
    assert free and free[0].function.name != "list_files", "the question shows nothing"
    assert {call.function.name for call in kept} == {"list_files"}
    allowed["allowed_tools"]["tools"] = []
    asked["tool_choice"] = allowed
    if mode == "auto":
        assert not client.chat.completions.create(**asked).choices[0].message.tool_calls
    else:
        with pytest.raises(openai.BadRequestError, match="none is offered"):
            client.chat.completions.create(**asked)


@pytest.mark.parametrize("stop", ["\n", "<", "tool_calls", "list"])
def test_a_stop_text_is_not_looked_for_in_calls(client, stop):
    """Nobody sees how calls are written, and an answer must not lose them."""
    asked = PLAIN | {"tools": [TOOL, OTHER], "tool_choice": "required", "max_tokens": 60}
    asked |= {"parallel_tool_calls": False}
    choice = client.chat.completions.create(**asked, stop=stop).choices[0]
    assert choice.message.tool_calls and choice.finish_reason == "tool_calls"
    text = client.chat.completions.create(**PLAIN, tools=[TOOL], tool_choice="none", stop="\n")
    assert "\n" not in text.choices[0].message.content
    assert text.choices[0].model_extra["stop_reason"] == "\n"


def test_tools_of_other_types_are_passed_over(client):
    tools = [{"type": "web_search"}, {"type": None}, TOOL]
    asked = PLAIN | {"max_tokens": 2}
    answer = client.chat.completions.create(**asked, tools=tools)
    offered = client.chat.completions.create(**asked, tools=[TOOL])
    assert answer.usage.prompt_tokens == offered.usage.prompt_tokens


def test_a_custom_tool_is_called_with_a_text(client, served):
    """Whole and in pieces; and its call is known when it comes back."""
    asked = PLAIN | {"tools": [TOOL, PATCH], "max_tokens": 200, "parallel_tool_calls": False}
    asked["tool_choice"] = {"type": "custom", "custom": {"name": "patch"}}
    whole = client.chat.completions.create(**asked)
    (call,) = whole.choices[0].message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "patch") and call.custom.input
    assert whole.choices[0].finish_reason == "tool_calls"
    data = [json.loads(each) for each in events(served, "/v1/chat/completions", asked)[:-1]]
    deltas = [c["choices"][0]["delta"].get("tool_calls") for c in data]
    (first,), *rest = filter(None, deltas)
    assert first.pop("id").startswith("call") and len(rest) > 1
    assert first == {"index": 0, "type": "custom", "custom": {"name": "patch", "input": ""}}
    assert all(each.keys() == {"index", "custom"} for (each,) in rest)
    assert "".join(each["custom"]["input"] for (each,) in rest) == call.custom.input
    history = [*QUESTION, whole.choices[0].message.model_dump()]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    answer = client.chat.completions.create(**asked | {"messages": history, "max_tokens": 1})
    assert answer.usage.prompt_tokens_details.cached_tokens >= whole.usage.total_tokens - 1
