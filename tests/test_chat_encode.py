"""The prompt text against the official cases, and the rules one by one."""

import copy
import json
from pathlib import Path

import pytest
from chat_messages import TOOL, assistant, call, system, tool, user
from hypothesis import given
from hypothesis import strategies as st

from ds4mlx.chat import encode_messages

DATA = Path(__file__).parent / "data" / "encoding"
MORE = json.loads((DATA / "more_cases.json").read_text(encoding="utf-8"))
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in "
    "your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial scenarios."
    "\nExplicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
BEYOND = (
    "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.\nYou MUST "
    "reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its "
    "root, and resolve the underlying cause rather than any surface symptom.\nDo not stop reasoning"
    " until you have independently verified the solution from multiple angles and are certain that "
    "no assumption remains unchecked and no error remains undiscovered.\n\n"
)


def after_tools(prompt):
    """What follows the announcement of the tools."""
    return prompt.split("to invoke tool calls.\n")[1]


def official_case(number):
    case = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    return (case["messages"], case["tools"]) if isinstance(case, dict) else (case, None)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_official_case(number):
    messages, tools = official_case(number)
    expected = (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")
    thinking = "none" if number == 4 else "high"
    assert encode_messages(messages, thinking, tools) == expected
    if tools:
        on_message = [{**messages[0], "tools": tools}, *messages[1:]]
        assert encode_messages(on_message, thinking) == expected


@pytest.mark.parametrize("case", MORE)
def test_more_official_case(case):
    assert encode_messages(case["messages"], case["thinking"]) == case["prompt"]


@pytest.mark.parametrize(
    ("release", "texts"),
    [("april", ["", "", "", ABSOLUTE]), ("0731", ["", "", ABSOLUTE, BEYOND])],
)
def test_effort_prefixes(release, texts):
    for thinking, text in zip(["none", "low", "high", "max"], texts, strict=True):
        mark = "</think>" if thinking == "none" else "<think>"
        expected = f"{BOS}{text}Be brief.<｜User｜>2+2?<｜Assistant｜>{mark}"
        messages = [system("Be brief."), user("2+2?")]
        assert encode_messages(messages, thinking, release=release) == expected


HISTORY = [user("a"), assistant("b", reasoning_content="r1"), user("c")]


def test_old_reasoning_is_dropped_unless_asked_for():
    kept = f"<｜Assistant｜><think>r1</think>b{EOS}<｜User｜>c<｜Assistant｜><think>"
    dropped = f"<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜><think>"
    assert encode_messages(HISTORY, "high") == f"{BOS}<｜User｜>a{dropped}"
    assert encode_messages(HISTORY, "high", drop_thinking=False) == f"{BOS}<｜User｜>a{kept}"
    assert after_tools(encode_messages(HISTORY, "high", [TOOL])) == f"<｜User｜>a{kept}"
    assert "r1" not in encode_messages(HISTORY, "none", [TOOL])


def test_missing_reasoning_is_an_empty_thought():
    prompt = encode_messages([user("a"), assistant("b")], "high")
    assert prompt == f"{BOS}<｜User｜>a<｜Assistant｜><think></think>b{EOS}"


def test_developer_messages_before_the_last_question_disappear():
    messages = [{"role": "developer", "content": "d"}, assistant("b"), user("c")]
    asks = "<｜User｜>c<｜Assistant｜>"
    assert encode_messages(messages, "high") == f"{BOS}b{EOS}{asks}<think>"
    shown = f"{BOS}<｜User｜>d<｜Assistant｜></think>b{EOS}{asks}</think>"
    assert encode_messages(messages, "none") == shown


def test_tool_turn():
    calls = [call("1", '{"x": 1, "s": "a<b", "o": {"k": [1, null]}}'), call("2", "{}")]
    messages = [
        user("u"),
        assistant("", reasoning_content="think", tool_calls=calls),
        *(tool("2", "R2"), tool("1", "R1"), user("and?")),
    ]
    assert after_tools(encode_messages(messages, "high", [TOOL])) == (
        "<｜User｜>u<｜Assistant｜><think>think</think>\n\n"
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="s" string="true">a<b</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="o" string="false">{"k": [1, null]}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}<｜User｜><tool_result>R1</tool_result>\n\n"
        "<tool_result>R2</tool_result>\n\nand?<｜Assistant｜><think>"
    )


def test_results_change_places_among_themselves_only():
    calls = [call(name, "{}") for name in "abc"]
    turn = [tool("c", "C"), user("text"), tool("?", "unknown"), tool("b", "B")]
    prompt = encode_messages([user("u"), assistant("", tool_calls=calls), *turn])
    results = ["<tool_result>unknown</tool_result>", "text", "<tool_result>B</tool_result>"]
    expected = "\n\n".join([*results, "<tool_result>C</tool_result>"])
    assert prompt.endswith(f"<｜User｜>{expected}<｜Assistant｜></think>")


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", "", "7", "[" * 9999, '"\\ud800"'])
def test_arguments_that_are_no_object_become_one_string(arguments):
    prompt = encode_messages([assistant("", tool_calls=[call("1", arguments)])])
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</' in prompt


def test_arguments_as_an_object_are_the_same_as_text():
    arguments = {"é": {"a": [1.5, True, None]}, "s": "x\ny", "": ""}
    as_object = [assistant("", tool_calls=[call("1", arguments)])]
    as_text = [assistant("", tool_calls=[call("1", json.dumps(arguments))])]
    assert encode_messages(as_object) == encode_messages(as_text)
    assert 'name="é" string="false">{"a": [1.5, true, null]}</' in encode_messages(as_object)


def test_users_merge_and_lose_the_later_task():
    prompt = encode_messages([user("a"), user("b", task="query")])
    assert prompt == f"{BOS}<｜User｜>a\n\nb<｜Assistant｜></think>"


def test_a_user_with_a_task_takes_results_but_no_text():
    prompt = encode_messages([user("a", task="query"), tool("1", "R"), user("b")])
    first = "<｜User｜>a\n\n<tool_result>R</tool_result>"
    assert prompt == f"{BOS}{first}<｜User｜>b<｜Assistant｜></think>"


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_quick_task_after_a_question(task):
    prompt = encode_messages([user("u", task=task)], "high")
    assert prompt == f"{BOS}<｜User｜>u<｜{task}｜>"


def test_action_and_title_tasks():
    action = encode_messages([user("u", task="action")], "high")
    assert action == f"{BOS}<｜User｜>u<｜Assistant｜><think><｜action｜>"
    messages = [user("u"), assistant("ans", task="title"), assistant("T", reasoning_content="r")]
    expected = f"{BOS}<｜User｜>u<｜Assistant｜><think></think>ans{EOS}<｜title｜>T{EOS}"
    assert encode_messages(messages, "high") == expected


def test_reminder_and_later_system_message():
    reminder = {"role": "latest_reminder", "content": "now"}
    prompt = encode_messages([reminder, user("u"), system("S"), user("v"), reminder])
    assert prompt == (
        f"{BOS}<｜latest_reminder｜>now<｜User｜>uS<｜User｜>v"
        "<｜Assistant｜></think><｜latest_reminder｜>now"
    )


def test_response_format_belongs_to_system_and_developer():
    section = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    for message, start in [(system("S"), "S"), ({"role": "developer", "content": "D"}, "D")]:
        prompt = encode_messages([{**message, "response_format": {"é": 1}}, user("u")])
        assert f'{start}\n\n{section}{{"é": 1}}<｜User｜>u' in prompt
    assert "Format" not in encode_messages([user("u", response_format={"a": 1})])


def test_without_end_or_beginning():
    messages = [user("a"), assistant("b", wo_eos=True)]
    assert encode_messages(messages, add_bos=False) == "<｜User｜>a<｜Assistant｜></think>b"


def test_tools_without_a_leading_system_message_get_one():
    prompt = encode_messages([user("u")], tools=[TOOL])
    assert prompt.startswith(f"{BOS}\n\n## Tools\n\nYou have access")
    assert '\n\n{"name": "f", "parameters": {"é": [1]}}\n\nYou MUST strictly' in prompt
    assert after_tools(prompt) == "<｜User｜>u<｜Assistant｜></think>"


def test_content_as_parts_or_missing():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    joined = "a\n\n[Unsupported image_url]\n\nb"
    assert f"<｜User｜>{joined}<" in encode_messages([user(parts)])
    assert f"<tool_result>{joined}</" in encode_messages([tool("1", parts)])
    assert encode_messages([system(parts), user(None)]).startswith(f"{BOS}{joined}<｜User｜><")
    assert encode_messages([assistant(None)]) == f"{BOS}{EOS}"


def test_content_blocks_stand_in_for_missing_content():
    blocks = [{"type": "tool_result", "tool_use_id": "1", "content": "R"}]
    blocks += [{"type": "text", "text": "t"}]
    prompt = encode_messages([{"role": "user", "content_blocks": blocks}])
    assert "<｜User｜><tool_result>R</tool_result>\n\nt<｜Assistant｜>" in prompt
    assert encode_messages([user("x", content_blocks=blocks)]) == encode_messages([user("x")])


def test_no_messages_are_the_beginning_alone():
    assert encode_messages([], "max") == BOS


@given(st.data(), st.sampled_from(MORE))
def test_context_continues_where_it_ended(data, case):
    messages = case["messages"]
    # Users merge across no boundary, and a turn before the last question may look different.
    cuts = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"]
    cut = data.draw(st.sampled_from(cuts))
    options = {"thinking": case["thinking"], "tools": [TOOL], "drop_thinking": False}
    head = encode_messages(messages[:cut], **options)
    tail = encode_messages(messages[cut:], context=messages[:cut], **options)
    assert head + tail == encode_messages(messages, **options)


def test_context_decides_what_is_shown():
    tail = encode_messages(HISTORY[2:], "max", context=HISTORY[:2])
    assert tail == "<｜User｜>c<｜Assistant｜><think>"
    asked = [{"role": "developer", "content": "d"}, assistant("b")]
    assert encode_messages([user("c")], "high", context=asked) == tail


@pytest.mark.parametrize("case", MORE)
def test_the_input_is_left_alone(case):
    messages, tools = copy.deepcopy(case["messages"]), [TOOL]
    encode_messages(messages, case["thinking"], tools, context=messages)
    assert messages == case["messages"]
    assert tools == [TOOL]
