"""Messages that the encoding refuses, and how it names them."""

import json

import pytest
from chat_messages import TOOL, assistant, call, system, tool, user
from hypothesis import given
from hypothesis import strategies as st

from ds4mlx.chat import encode_messages
from ds4mlx.errors import DataError

DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("hello", "must be an object"),
        ({"content": "x"}, "role"),
        ({"role": "bot"}, "unknown role 'bot'"),
        ({"role": ["user"]}, "role"),
        (user(7), "content must be text"),
        (user(["x"]), "a part of the content"),
        (user([{"type": "text", "text": 1}]), "text must be text"),
        (user([{"type": DEEP}]), "type must be text"),
        (user("\ud800"), "not Unicode"),
        (user("x", task="dance"), "unknown task 'dance'"),
        (user("x", task=["query"]), "unknown task"),
        (tool(7, "x"), "tool_call_id must be text"),
        (tool("1", {"a": 1}), "content must be text"),
        ({"role": "developer", "content": ""}, "needs content"),
        (system("x", tools=7), "tools must be a list"),
        (system("x", tools=[{"name": "f"}]), "tool 0 needs an object as its function"),
        (system("x", tools=[{"function": {"a": {1}}}]), "JSON"),
        (system("x", response_format={"a": "\ud800"}), "JSON"),
        (assistant("x", reasoning_content=["r"]), "reasoning_content must be text"),
        (assistant("x", tool_calls={"id": 1}), "tool_calls must be a list"),
        (assistant("x", tool_calls=["f"]), "tool call 0 must be an object"),
        (assistant("x", tool_calls=[{"id": "1"}]), "tool call 0 needs an object as its function"),
        (assistant("x", tool_calls=[{"function": {"arguments": "{}"}}]), "name"),
        (assistant("x", tool_calls=[call("1", 7)]), "needs arguments"),
        (assistant("x", tool_calls=[call(1, "{}")]), "id must be text"),
        (assistant("x", tool_calls=[call("1", {"a": object()})]), "JSON"),
    ],
)
def test_bad_message_is_named(message, cause):
    with pytest.raises(DataError, match=r"^message 1") as caught:
        encode_messages([user("fine"), message])
    assert cause in str(caught.value)
    with pytest.raises(DataError, match=r"^context message 0"):
        encode_messages([user("fine")], context=[message])


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"thinking": "medium"}, "thinking must be one of none, low, high, max, not 'medium'"),
        ({"thinking": None}, "thinking"),
        ({"release": "may"}, "release must be one of april, 0731, not 'may'"),
        ({"tools": "f"}, "the tools argument: tools must be a list"),
        ({"tools": [TOOL, {}]}, "the tools argument: tool 1"),
        ({"messages": user("x")}, "must be a list"),
    ],
)
def test_bad_option_is_named(options, cause):
    with pytest.raises(DataError, match=cause):
        encode_messages(**{"messages": [user("x")], **options})


KEYS = ["role", "content", "tool_calls", "tools", "task", "content_blocks", "response_format"]
KEYS += ["reasoning_content", "tool_call_id", "type", "text", "function", "name", "arguments"]
WORDS = st.sampled_from(["user", "system", "assistant", "tool", "developer", "text", "query", "{}"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers(0, 2), inner, max_size=5)
    ),
)
ALMOST = st.fixed_dictionaries({"role": WORDS}, optional=dict.fromkeys(KEYS[1:], ANYTHING))


@given(st.lists(ALMOST | ANYTHING, max_size=4), st.sampled_from(["none", "max"]))
def test_anything_is_encoded_or_refused(messages, thinking):
    try:
        prompt = encode_messages(messages, thinking)
    except DataError as error:
        assert "message" in str(error)
    else:
        assert prompt.encode().startswith("<｜begin▁of▁sentence｜>".encode())


USE = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
CALLED = assistant("", tool_calls=[call("1", {"x": 1})])


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (user([{"type": "input_text", "text": "a"}]), user("a")),
        (user([{"type": "output_text", "text": "a", "annotations": [1]}]), user("a")),
        (user([{"type": "text", "text": "a", "cache_control": {"type": "e"}}]), user("a")),
        (user("a", name="me", id="7", cache_control={"type": "e"}), user("a")),
        (user(None), user("")),
        (user([]), user("")),
        (assistant("b", reasoning="r"), assistant("b", reasoning_content="r")),
        (assistant("b", reasoning_text="r"), assistant("b", reasoning_content="r")),
        (assistant("b", thinking="r", reasoning="r"), assistant("b", reasoning_content="r")),
        (
            assistant("b", reasoning_details=[{"type": "reasoning.text", "text": "r"}]),
            assistant("b", reasoning_content="r"),
        ),
        (
            assistant("b", reasoning="r", reasoning_details=[{"data": "x"}]),
            assistant("b", reasoning_content="r"),
        ),
        (
            assistant(
                [
                    {"type": "thinking", "thinking": "r", "signature": "s"},
                    {"type": "text", "text": "b"},
                ]
            ),
            assistant("b", reasoning_content="r"),
        ),
        (
            assistant(
                [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
                    {"type": "output_text", "text": "b"},
                ]
            ),
            assistant("b", reasoning_content="r"),
        ),
        (assistant([{"type": "text", "text": "b"}, USE]), {**CALLED, "content": "b"}),
        (assistant([USE]), CALLED),
        (assistant(None, function_call={"name": "f", "arguments": '{"x": 1}'}), CALLED),
        (assistant("", function_call=None, tool_calls=[call("1", '{"x": 1}')]), CALLED),
        (assistant("", tool_calls=[call("1", None)]), assistant("", tool_calls=[call("1", "{}")])),
        (assistant("", function_call={"name": "f"}), assistant("", tool_calls=[call("", "{}")])),
        (assistant([{**USE, "input": None}]), assistant([{**USE, "input": {}}])),
        (assistant(None, refusal="no"), assistant("no")),
        (assistant([{"type": "refusal", "refusal": "no"}]), assistant("no")),
        (assistant("b", prefix=True), assistant("b", wo_eos=True)),
        (assistant("b", refusal=None, audio=None, annotations=[]), assistant("b")),
        ({"role": "function", "name": "f", "content": "R"}, tool("", "R")),
        ({**tool("1", "R"), "name": "f", "is_error": True}, tool("1", "R")),
        (tool("1", [{"type": "text", "text": "R"}]), tool("1", "R")),
        (tool("1", None), tool("1", "")),
        (
            user([{"type": "tool_result", "tool_use_id": "1", "content": "R", "is_error": True}]),
            tool("1", "R"),
        ),
        (
            user(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [{"type": "text", "text": "R"}],
                    }
                ]
            ),
            tool("1", "R"),
        ),
        (user([{"type": "tool_result", "tool_use_id": "1"}]), tool("1", "")),
    ],
)
def test_what_is_known_is_read_under_any_of_its_names(given, same):
    for thinking in ("none", "high"):
        texts = [encode_messages([user("u"), one], thinking) for one in (given, same)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (user("a", tool_calls=[call("1", "{}")]), "'tool_calls' is not one that is read"),
        (user("a", reasoning="r"), "'reasoning' is not one that is read"),
        (user("a", texts="r"), "'texts' is not one that is read"),
        (system("a", function_call={"name": "f"}), "'function_call' is not one that is read"),
        (assistant("a", audio={"id": "1"}), "'audio' is not one that is read"),
        (assistant("a", tool_call_id="1"), "'tool_call_id' is not one that is read"),
        ({**tool("1", "R"), "tool_calls": [1]}, "'tool_calls' is not one that is read"),
        (assistant("a", reasoning="r", reasoning_content="s"), "hold different reasoning"),
        (assistant([{"type": "thinking", "thinking": "r"}], thinking="s"), "different reasoning"),
        (
            assistant("a", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
            "reasoning_details needs text",
        ),
        (assistant([USE], tool_calls=[call("2", "{}")]), "both as tool_calls and as tool_use"),
        (
            assistant(
                "", function_call={"name": "f", "arguments": "{}"}, tool_calls=[call("2", "{}")]
            ),
            "both as tool_calls and as function_call",
        ),
        (assistant("", function_call={"arguments": "{}"}), "function_call needs text as its name"),
        (assistant("", function_call={"name": "f", "arguments": []}), "call needs arguments"),
        (assistant([{**USE, "input": [1]}]), "part of type 'tool_use' needs arguments"),
        (assistant([{**USE, "name": 7}]), "needs text as its name"),
        (assistant([{"type": "redacted_thinking", "data": "x"}]), "'redacted_thinking' cannot be"),
        (assistant([{"type": "server_tool_use", "id": "1"}]), "'server_tool_use' cannot be read"),
        (user([USE]), "'tool_use' cannot be read in the content of a message of the role user"),
        (user([{"type": "thinking", "thinking": "r"}]), "'thinking' cannot be read"),
        (assistant([{"type": "tool_result", "tool_use_id": "1"}]), "'tool_result' cannot be read"),
        (system([{"type": "poem", "text": "a"}]), "'poem' cannot be read"),
        (user([{"text": "a"}]), "type '' cannot be read"),
        (user([{"type": "text", "text": "a", "more": "b"}]), "'more' is not one that is read"),
        (user([{"type": "tool_result", "tool_use_id": "1", "result": "R"}]), "'result' is not one"),
        (user([{"type": "tool_result", "content": [{"type": "tool_result"}]}]), "'tool_result'"),
        (
            assistant("", tool_calls=[{**call("1", "{}"), "input": {"x": 1}}]),
            "tool call 0: the key",
        ),
        (assistant("", tool_calls=[{"type": "custom", "custom": {"name": "f"}}]), "its function"),
    ],
)
def test_what_is_not_known_is_refused_by_name(message, cause):
    with pytest.raises(DataError, match=r"^message 1\b") as caught:
        encode_messages([user("u"), message])
    assert cause in str(caught.value)


@pytest.mark.parametrize("thinking", ["none", "high"])
def test_a_developer_between_a_call_and_its_result_stays(thinking):
    middle = [{"role": "developer", "content": "D"}, tool("1", "R")]
    prompt = encode_messages([user("u"), CALLED, *middle], thinking)
    assert "<｜User｜>D<｜User｜><tool_result>R</tool_result>" in prompt
    middle.insert(1, {"role": "latest_reminder", "content": "now"})
    assert "<｜User｜>D" in encode_messages([user("u"), CALLED, *middle, user("v")], thinking)
