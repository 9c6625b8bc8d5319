"""Tool calls in a completion that strays from the official markup."""

import json

import pytest
from chat_messages import ARGUMENTS, BLOCK, CALL, EOS, block, calls_of, invoke, parameter

from ds4mlx.chat import parse_completion


@pytest.mark.parametrize(
    ("markup", "fault"),
    [
        (BLOCK.replace("｜DSML｜", "DSML｜"), "official form"),
        (BLOCK.replace("｜DSML｜", "|DSML|"), "official form"),
        (BLOCK.replace("｜DSML｜", "DSML|"), "official form"),
        (BLOCK.replace("｜DSML｜", ""), "official form"),
        (BLOCK.replace("\n", ""), "official form"),
        (BLOCK.replace("\n", "\n\n  "), "official form"),
        (BLOCK.replace("</｜DSML｜", "</DSML｜"), "official form"),
        (BLOCK.replace('x" string="true"', 'x"'), "official form"),
        (BLOCK.removesuffix("</｜DSML｜tool_calls>"), "not closed"),
        (BLOCK + "\n", "text after the tool calls"),
    ],
)
def test_slips_of_the_markup_are_read_and_reported(markup, fault):
    message = parse_completion(f"c\n\n{markup}{EOS}")
    assert message["content"] == "c"
    assert calls_of(message) == [("f", ARGUMENTS)]
    [reported] = message["malformed"]
    assert fault in reported


@pytest.mark.parametrize("gap", ["", "\n"])
def test_missing_blank_line(gap):
    message = parse_completion(f"c{gap}{BLOCK}")
    assert message["content"] == "c"
    assert calls_of(message) == [("f", ARGUMENTS)]
    assert message["malformed"] == ["no blank line before the tool calls"]


@pytest.mark.parametrize("cut", range(len("<｜DSML｜tool_calls>"), len(BLOCK)))
def test_a_cut_call_is_not_executed(cut):
    closed = cut >= BLOCK.index("</｜DSML｜invoke>") + len("</｜DSML｜invoke>")
    message = parse_completion(f"c\n\n{BLOCK[:cut]}")
    assert bool(message["tool_calls"]) == closed
    assert message["malformed"]
    assert message["content"] == ("c" if closed else f"c\n\n{BLOCK[:cut]}")


def test_complete_calls_before_a_cut_one_count():
    cut = invoke("g", parameter("x", "y")).removesuffix("</｜DSML｜invoke>")
    message = parse_completion(f"c\n\n{block(CALL, cut)}")
    assert calls_of(message) == [("f", ARGUMENTS)]
    assert message["content"].startswith('c\n\n<｜DSML｜invoke name="g">')
    assert "incomplete tool call" in message["malformed"]


def test_value_runs_to_the_first_closing_tag_of_its_kind():
    value = "</parameter></invoke>\n</|DSML|parameter>" + EOS + '" string="true">\n<think>'
    message = parse_completion(f"\n\n{block(invoke('f', parameter('x', value)))}{EOS}")
    assert json.loads(calls_of(message)[0][1]) == {"x": value}
    assert message["malformed"] == []


def test_values_that_are_no_json():
    values = ["hello", "NaN", "", "{'a': 1}", "9" * 5000, "[" * 5000]
    parameters = [parameter(f"p{i}", value, "false") for i, value in enumerate(values)]
    message = parse_completion(f"\n\n{block(invoke('f', *parameters))}")
    assert list(json.loads(calls_of(message)[0][1]).values()) == values
    assert message["malformed"] == [f"parameter p{i} is not JSON" for i in range(len(values))]


def test_a_parameter_given_twice():
    twice = invoke("f", parameter("x", "1"), parameter("y", "2"), parameter("x", "3"))
    message = parse_completion(f"\n\n{block(twice)}")
    assert calls_of(message) == [("f", '{"x": "3", "y": "2"}')]
    assert message["malformed"] == ["parameter x given twice"]


@pytest.mark.parametrize("empty", ["\n\n", "\n"])
def test_calls_without_parameters(empty):
    bare = f'<｜DSML｜invoke name="f">{empty}</｜DSML｜invoke>'
    message = parse_completion(f"\n\n{block(bare, bare)}{EOS}")
    assert calls_of(message) == [("f", "{}")] * 2
    assert message["malformed"] == []


@pytest.mark.parametrize(
    "text",
    [
        "Write `<tool_calls><invoke name='f'>` to call.",
        'The tag <tool_calls>\n<invoke name="f"></invoke>\n</tool_calls> is XML.',
        "<tool_calls> is a tag",
        "DSML means markup",
    ],
)
def test_talk_about_markup_is_content(text):
    message = parse_completion(text)
    assert (message["content"], message["tool_calls"]) == (text, [])
    assert message["malformed"] == []


def test_a_call_quoted_before_the_official_block_is_content():
    quoted = 'Like this:\n<tool_calls>\n<invoke name="g">\n</invoke>\n</tool_calls>'
    message = parse_completion(f"{quoted}\n\n{BLOCK}{EOS}")
    assert calls_of(message) == [("f", ARGUMENTS)]
    assert message["content"] == quoted
    assert message["malformed"] == []
