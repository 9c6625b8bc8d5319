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
        (assistant("x", tool_calls=[call("1", None)]), "arguments"),
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
