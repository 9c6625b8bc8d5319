"""Bodies of Messages and Responses with something wrong anywhere in them: refused, never a crash."""

import copy
import json

from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ds4mlx.chat import encode_segments
from ds4mlx.errors import DataError
from ds4mlx.server import messages, responses
from ds4mlx.server.errors import Refusal, refusal_of
from ds4mlx.server.kept_responses import KeptResponses
from ds4mlx.server.response_object import response_of
from ds4mlx.server.roles import settled
from ds4mlx.server.schemas_messages import MessagesRequest
from ds4mlx.server.schemas_responses import ResponsesRequest

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
FORM = {"type": "json_schema", "name": "f", "schema": SCHEMA}
RESULT = {"type": "tool_result", "tool_use_id": "c", "is_error": False}
MESSAGES = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": "1"}},
            ],
        },
        {
            "role": "user",
            "content": [
                RESULT | {"content": [{"type": "image", "source": {"type": "base64"}}]},
                RESULT
                | {"content": [{"type": "document", "source": {"type": "text", "data": "d"}}]},
                RESULT | {"content": [{"type": "search_result", "content": [{"text": "r"}]}]},
            ],
        },
        {"role": "system", "content": "later"},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}, {"type": "bash_1"}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low", "format": FORM},
    "stop_sequences": ["x"],
}
RESPONSES = {
    "model": "m",
    "input": [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "summary": [{"text": "s"}], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "!"}]},
        {"type": "function_call", "call_id": "c", "namespace": "n", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text"}]},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "+"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "ok"},
        {"type": "local_shell_call", "call_id": "e", "action": {"command": ["ls"]}},
        {"type": "additional_tools", "tools": [{"type": "function", "name": "h"}]},
    ],
    "instructions": "i",
    "tools": [
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"type": "custom", "name": "g", "format": {"type": "grammar", "definition": "x"}},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
    ],
    "tool_choice": {"type": "function", "name": "f", "namespace": "n"},
    "reasoning": {"effort": "low"},
    "text": {"format": FORM},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
}
JUNK = [None, True, 0, -1, 1 << 80, 0.5, "", "x", "auto", "text", "\u0000", [], {}, [[]], [None]]
JUNK += [{"type": []}, {"type": "text"}, [{"type": "tool_use"}], {"$ref": "#"}, {"role": {}}]


def places(value, path=()):
    """The ways to everything inside a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def spoiled(body, changes):
    body = copy.deepcopy(body)
    for at, junk in changes:
        *way, last = list(places(body))[at % len(list(places(body)))]
        inner = body
        for key in way:
            inner = inner[key]
        inner[last] = copy.deepcopy(junk)
    return body


def asked_of_messages(body):
    return messages.question_of(MessagesRequest.model_validate(body))


def asked_of_responses(body):
    read = ResponsesRequest.model_validate(body)
    asked = responses.Asked(read, KeptResponses())
    json.dumps(response_of("resp_1", read, "m"))
    return asked.question(read)


def is_read(ask, body):
    """Whether a body becomes a prompt; anything but a refusal of ours fails the test."""
    try:
        question = ask(body)
        encode_segments(settled(question.messages), question.thinking, question.tools or None)
    except (DataError, Refusal, ValidationError) as error:
        assert 400 <= refusal_of(error).status < 500
        return False
    return True


CHANGES = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(JUNK)), min_size=1, max_size=3)


@given(CHANGES)
def test_messages(changes):
    is_read(asked_of_messages, spoiled(MESSAGES, changes))


@given(CHANGES)
def test_responses(changes):
    is_read(asked_of_responses, spoiled(RESPONSES, changes))


def test_every_place_with_every_junk():
    for ask, body in ((asked_of_messages, MESSAGES), (asked_of_responses, RESPONSES)):
        assert is_read(ask, body)
        for at in range(len(list(places(body)))):
            for junk in JUNK:
                is_read(ask, spoiled(body, [(at, junk)]))
