"""What requests of all protocols become: the messages and wishes given to the model, or a refusal."""

import pytest
from pydantic import ValidationError

from ds4mlx.chat import encode_segments
from ds4mlx.errors import DataError
from ds4mlx.server import messages_request, responses_request
from ds4mlx.server.errors import refusal_of
from ds4mlx.server.messages_in import known_messages
from ds4mlx.server.offered import of_messages, of_responses
from ds4mlx.server.roles import settled
from ds4mlx.server.schemas_messages import CountRequest, MessagesRequest
from ds4mlx.server.schemas_responses import InputTokensRequest, ResponsesRequest
from ds4mlx.server.sealed import seal

BILLING = "x-anthropic-billing-header: cc_version=2.1.197.bcf; cc_entrypoint=cli;"
MOVING = {"cache_control": {"type": "ephemeral"}}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def prompt(messages, thinking="high", tools=None):
    return encode_segments(settled(messages), thinking, tools).text


def prompt_of_messages(thinking="high", **body):
    read = CountRequest.model_validate({"messages": [], **body} | {"messages": body["messages"]})
    tools = of_messages(read.tools or []).functions
    return prompt(messages_request.messages_of(read), thinking, tools)


def prompt_of_items(items, instructions=None, thinking="high", tools=()):
    functions = of_responses(tools).functions
    return prompt(responses_request.messages_of(instructions, items), thinking, functions)


def test_the_spelling_of_a_conversation_does_not_show_in_its_prompt():
    user = {"role": "user"}
    plain = prompt_of_messages(system="Be.", messages=[user | {"content": "hello"}])
    assert plain.startswith("<｜begin▁of▁sentence｜>Be.<｜User｜>hello")
    blocks = [text("hello", **MOVING)]
    header = [text(BILLING), text("Be.", **MOVING)]
    for system in ("Be.", header, [text(f"{BILLING}\nBe.")], f"{BILLING}\n\nBe."):
        assert prompt_of_messages(system=system, messages=[user | {"content": blocks}]) == plain
    assert BILLING in prompt_of_messages(messages=[user | {"content": BILLING}])


def test_a_tool_s_turn_of_messages_is_that_of_chat():
    thought = {"type": "thinking", "thinking": "See.", "signature": "any"}
    call = {"type": "tool_use", "id": "call_1", "name": "f", "input": {"x": 1}, "caller": None}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [text("42")]}
    chat = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "reasoning_content": "See.",
            "content": "Now.",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    tools = [{"name": "f", "description": "d", "input_schema": {"type": "object"}, **MOVING}]
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    expected = prompt(chat, tools=[{"type": "function", "function": function}])
    messages = [chat[0], {"role": "assistant", "content": [thought, text("Now."), text(""), call]}]
    messages.append({"role": "user", "content": [result | {"is_error": False}]})
    assert prompt_of_messages(messages=messages, tools=tools) == expected
    hidden = {"type": "thinking", "thinking": "", "signature": seal("See.")}
    messages[1]["content"][0] = hidden
    assert prompt_of_messages(messages=messages, tools=tools) == expected


def test_a_tool_s_turn_of_responses_is_that_of_messages():
    thought = {"type": "thinking", "thinking": "See.", "signature": ""}
    call = {"type": "tool_use", "id": "call_1", "name": "n__f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "42"}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [thought, text("Now."), call]},
        {"role": "user", "content": [result]},
    ]
    expected = prompt_of_messages(system="Be.", messages=messages)
    output = {"type": "output_text", "text": "Now.", "annotations": [], "logprobs": []}
    function = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "namespace": "n"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "?"}]},
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "See."}],
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [output]},
        function | {"name": "f", "arguments": '{"x":1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "42"},
    ]
    assert prompt_of_items(items, "Be.") == expected
    items[1] = {"type": "reasoning", "summary": [], "encrypted_content": seal("See.")}
    items[4]["output"] = [{"type": "input_text", "text": "42"}]
    assert prompt_of_items(items, "Be.") == expected


def test_those_who_run_the_model_speak_before_everybody_else():
    developers = [
        {"role": "developer", "content": "A."},
        {"role": "system", "content": [text("B.")]},
    ]
    late = {"role": "system", "content": "Later."}
    items = [*developers, {"role": "user", "content": "?"}, late]
    asked = prompt_of_items(items, "I.")
    assert asked.startswith(
        "<｜begin▁of▁sentence｜>I.\n\nA.\n\nB.<｜User｜>?\n\nLater.<｜Assistant｜>"
    )
    answered = [*items, {"role": "assistant", "content": "!"}, {"role": "user", "content": "??"}]
    assert prompt_of_items(answered, "I.", "none").startswith(prompt_of_items(items, "I.", "none"))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"type": "image", "source": {"type": "base64", "data": "aa"}}, "[Unsupported image]"),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "D"}}, "T\nD"),
        (
            {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}},
            "a\nb",
        ),
        ({"type": "document", "source": {"type": "base64"}}, "[Unsupported document]"),
        ({"type": "search_result", "title": "T", "source": "s", "content": [text("r")]}, "T\ns\nr"),
        ({"type": "tool_reference", "tool_name": "grep"}, "grep"),
        ({"type": "browser_state"}, "[Unsupported browser_state]"),
    ],
)
def test_what_tools_give_that_is_no_text(block, said):
    result = {"type": "tool_result", "tool_use_id": "c", "content": [block]}
    messages = [{"role": "user", "content": [result]}]
    assert f"<tool_result>{said}</tool_result>" in prompt_of_messages(messages=messages)


def test_what_other_models_have_left_is_no_obstacle():
    left = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "web_search_tool_result"},
        text("!"),
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": left}]
    messages.append({"role": "user", "content": "go"})
    assert "[Unsupported web_search_tool_result]\n\n!" in prompt_of_messages(messages=messages)
    items = [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "local_shell_call", "call_id": "c", "action": {"command": ["ls"]}},
        {"type": "local_shell_call_output", "call_id": "c", "output": [{"stdout": "a"}]},
        {"type": "custom_tool_call", "call_id": "d", "name": "patch", "input": "+"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "ok"},
        {"type": "mcp_call", "id": "e", "name": "find", "arguments": "{}", "output": "all"},
    ]
    told = prompt_of_items(items)
    assert '<｜DSML｜parameter name="command" string="false">["ls"]' in told
    assert '[{"stdout": "a"}]' in told and 'name="input" string="true">+<' in told
    assert "<tool_result>all</tool_result>" in told


def test_a_call_without_arguments_is_taken_in_every_protocol():
    user = {"role": "user", "content": "?"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    expected = prompt([user, {"role": "assistant", "content": "", "tool_calls": [call]}])
    call["function"]["arguments"] = None
    chat = [user, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert prompt(known_messages(chat)) == expected
    use = {"type": "tool_use", "id": "c", "name": "f", "input": None}
    assert prompt_of_messages(messages=[user, {"role": "assistant", "content": [use]}]) == expected
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": None}
    assert prompt_of_items([user, item]) == expected


@pytest.mark.parametrize(
    "content", [3, [3], [{"type": "text", "text": 3}], [{"type": ["text"]}], [{}], {"type": "text"}]
)
def test_content_of_a_wrong_type_is_refused(content):
    for role in ("user", "assistant"):
        with pytest.raises(DataError, match="message 0"):
            prompt_of_messages(messages=[{"role": role, "content": content}])
        with pytest.raises(DataError, match="message 0"):
            prompt_of_items([{"type": "message", "role": role, "content": content}])


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function_call", "call_id": "c", "name": ["f"], "arguments": "{}"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": 3},
        {"type": "function_call_output", "call_id": ["c"], "output": "x"},
        {"type": "message", "role": ["user"], "content": "x"},
        {"type": "message", "role": "nobody", "content": "x"},
    ],
)
def test_items_of_a_wrong_type_are_refused(item):
    with pytest.raises(DataError):
        prompt_of_items([item])


@pytest.mark.parametrize(
    ("body", "thinking"),
    [
        ({}, ("none", None)),
        ({"thinking": {"type": "disabled"}}, ("none", None)),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, ("high", 7)),
        ({"thinking": {"type": "adaptive"}}, ("high", None)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, ("low", None)),
        (
            {"thinking": {"type": "between_tools"}, "output_config": {"effort": "max"}},
            ("max", None),
        ),
        ({"output_config": {"effort": "max"}}, ("none", None)),
    ],
)
def test_how_hard_messages_thinks(body, thinking):
    read = CountRequest.model_validate({"messages": [{"role": "user", "content": "?"}], **body})
    assert messages_request.thinking_of(read) == thinking


def test_the_beginning_of_an_answer_is_continued_without_a_thought():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{"}]
    body = {"messages": messages, "thinking": {"type": "adaptive"}}
    read = CountRequest.model_validate(body)
    assert messages_request.thinking_of(read) == ("none", None)
    assert prompt(messages_request.messages_of(read), "none").endswith("</think>{")


@pytest.mark.parametrize(
    ("effort", "thinking"),
    [(None, "high"), ("none", "none"), ("minimal", "low"), ("xhigh", "high"), ("max", "max")],
)
def test_how_hard_responses_thinks(effort, thinking):
    read = InputTokensRequest.model_validate({"reasoning": {"effort": effort}})
    assert responses_request.thinking_of(read) == thinking


def test_a_history_of_another_model_is_taken_in_chat():
    """What only that model can read says nothing; a custom tool's call is a call."""
    sealed = {"type": "reasoning.encrypted", "data": "gAAA", "index": 1}
    said = {"type": "reasoning.text", "text": "See.", "signature": None}
    custom = {"name": "patch", "input": "*** Begin"}
    answer = {"role": "assistant", "content": None, "reasoning_details": [said, sealed]}
    answer["tool_calls"] = [{"id": "c", "type": "custom", "custom": custom}]
    function = {"name": "patch", "arguments": '{"input": "*** Begin"}'}
    plain = {"role": "assistant", "content": "", "reasoning_content": "See."}
    plain["tool_calls"] = [{"id": "c", "type": "function", "function": function}]
    rest = [{"role": "tool", "tool_call_id": "c", "content": "ok"}]
    asked = [{"role": "user", "content": "?"}]
    assert prompt(known_messages([*asked, answer, *rest])) == prompt([*asked, plain, *rest])


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (MessagesRequest, {"max_tokens": "5"}),
        (MessagesRequest, {"max_tokens": -1}),
        (MessagesRequest, {}),
        (MessagesRequest, {"max_tokens": 1, "messages": "hi"}),
        (MessagesRequest, {"max_tokens": 1, "messages": []}),
        (MessagesRequest, {"max_tokens": 1, "thinking": {"type": "enabled", "budget_tokens": 0}}),
        (MessagesRequest, {"max_tokens": 1, "temperature": "hot"}),
        (ResponsesRequest, {"input": 3}),
        (ResponsesRequest, {"input": ["x"]}),
        (ResponsesRequest, {"store": 1}),
        (ResponsesRequest, {"top_logprobs": 21}),
    ],
)
def test_wrong_types_are_refused(schema, body):
    with pytest.raises(ValidationError):
        schema.model_validate({"messages": [{"role": "user", "content": "?"}], **body})


@pytest.mark.parametrize(
    ("body", "place", "fault"),
    [
        ({"stop": [""]}, "stop.0", "String should have at least 1 character"),
        ({"stop": ["a"] * 65}, "stop", "List should have at most 64 items"),
        ({"stop": "a" * 1025}, "stop", "String should have at most 1024 characters"),
        ({"stop": 5}, "stop", "Input should be a valid string or a valid list"),
        ({"input": ["x"]}, "input.0", "Input should be a valid dictionary"),
        ({"tool_choice": 3}, "tool_choice", "Input should be a valid string or a valid dictionary"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "Input should be 'text'"),
    ],
)
def test_what_is_wrong_with_one_of_several_forms_is_said_of_the_one_that_was_meant(
    body, place, fault
):
    with pytest.raises(ValidationError) as wrong:
        ResponsesRequest.model_validate(body)
    refusal = refusal_of(wrong.value)
    assert refusal.param == place and refusal.message.startswith(f"{place}: {fault}")
