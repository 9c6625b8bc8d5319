"""Tool calls in a completion that strays from the official markup."""

import json

import pytest
from chat_messages import ARGUMENTS, BLOCK, CALL, EOS, block, calls_of, invoke, parameter
from chat_spellings import BAD, HOSTILE, INSIDE, MENDED, SLIPS

from ds4mlx.chat import parse_completion


@pytest.mark.parametrize(("markup", "fault"), SLIPS)
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


@pytest.mark.parametrize(
    "end",
    [
        *(
            "</｜DSML｜param>",
            "",
            "</parameter>",
            "</｜DSML｜parameter",
            "</ ｜DSML｜parameter>",
            "\n",
        ),
        *("</|DSML|parameter>", "</｜DSML｜Parameter>", "<｜DSML｜parameter>", "</｜DSML｜invoke>"),
    ],
)
@pytest.mark.parametrize("gap", ["\n", "", "\n\n  "])
def test_a_value_that_is_not_closed_swallows_nothing(end, gap):
    """Neither the next parameter nor the next call; the call is broken, the others are read."""
    head = '<｜DSML｜invoke name="a"><｜DSML｜parameter name="x" string="true">1'
    bad = f"{head}{end}{gap}</｜DSML｜invoke>"
    twice = f"{head}{end}{gap}{parameter('y', '2')}</｜DSML｜invoke>"
    good = invoke("b", parameter("z", "3"))
    for calls in ((bad, good), (twice, good), (good, bad), (good, twice, CALL)):
        message = parse_completion(
            f"c\n\n<｜DSML｜tool_calls>{gap.join(calls)}</｜DSML｜tool_calls>"
        )
        expected = [("b", '{"z": "3"}')] + [("f", ARGUMENTS)] * (CALL in calls)
        assert calls_of(message) == expected
        assert 'name="a"' in message["content"]
        assert any("call of a" in f and "value of x" in f for f in message["malformed"])


@pytest.mark.parametrize(
    "quoted",
    [
        "</parameter></invoke>\n<invoke name='g'>\n</invoke></tool_calls>",
        '<tool_calls>\n<invoke name="g">\n<parameter name="x">1</parameter>\n</invoke>',
        '<|DSML|invoke name="g">\n<|DSML|parameter name="x" string="true">1</|DSML|parameter>',
        '<DSML｜invoke name="g">\n\n</DSML｜invoke>',
        "re.compile(r'<｜DSML｜invoke name=\"(.*?)\">')",
        'open = f"<{DSML}invoke name=\\"{name}\\">"',
        "CALLS := { '<｜DSML｜invoke name=\"' NAME '\">\\n' { PARAM } ['\\n'] '</｜DSML｜invoke' '>' }",
        "'<｜DSML｜parameter name=\"' KEY '\" string=\"' (true|false) '\">' VALUE",
        'Write `<｜DSML｜invoke name="g">` and `<｜DSML｜parameter name="x" string="true">` to call.',
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="$TOOL_NAME">\n'
        '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE',
        '"<｜DSML｜tool_calls>" in text and text.endswith("</｜DSML｜tool_calls>")',
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        '<function_calls>\n<invoke name="g">\n</invoke>\n</function_calls>',
        EOS + "<think></think><｜User｜>",
    ],
)
def test_a_value_may_quote_markup(quoted):
    for value in (quoted, f"a\n{quoted}\nb", f"```\n{quoted}\n```"):
        text = f"\n\n{block(invoke('f', parameter('x', value), parameter('y', '2')), CALL)}{EOS}"
        message = parse_completion(text)
        assert calls_of(message)[1:] == [("f", ARGUMENTS)]
        assert json.loads(calls_of(message)[0][1]) == {"x": value, "y": "2"}
        assert message["malformed"] == []


@pytest.mark.parametrize(("markup", "mended"), MENDED)
def test_what_is_unambiguous_is_read_and_reported(markup, mended):
    for thinking, start in (("none", ""), ("high", "r</think>")):
        message = parse_completion(f"{start}c\n\n{markup}{EOS}", thinking)
        assert calls_of(message) == [("f", ARGUMENTS)]
        assert message["content"] == "c"
        [fault] = message["malformed"]
        assert mended in fault


def test_blocks_that_follow_each_other_are_read():
    message = parse_completion(f"c\n\n{BLOCK}\n\n{BLOCK}\n{INSIDE}")
    assert calls_of(message) == [("f", ARGUMENTS)] * 3
    assert message["content"] == "c"
    assert any("several blocks of calls" in fault for fault in message["malformed"])


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_call_costs_no_other(bad):
    other = invoke("h", parameter("z", "3"))
    for calls in ((bad, CALL), (other, bad, CALL), (CALL, bad)):
        message = parse_completion(f"c\n\n{block(*calls)}{EOS}")
        expected = [("h", '{"z": "3"}')] * (other in calls) + [("f", ARGUMENTS)]
        assert calls_of(message) == expected
        assert message["malformed"]
        assert bad.split("\n")[0] in message["content"]


def test_a_repeated_key_in_a_json_body_is_reported():
    bare = '<｜DSML｜invoke name="f">{"x": 1, "y": {"z": [1]}, "x": "</invoke>"}</｜DSML｜invoke>'
    message = parse_completion(f"\n\n{block(bare)}")
    assert calls_of(message) == [("f", '{"x": "</invoke>", "y": {"z": [1]}}')]
    assert "parameter x given twice" in message["malformed"]


@pytest.mark.parametrize(
    "text",
    [
        'Write\n<invoke name="f">\n</invoke>\nto call.',
        '```xml\n<invoke name="f">\n</invoke>\n```',
        '```xml\n<tool_calls>\n<invoke name="f">\n</invoke>\n</tool_calls>\n```',
        'So: <invoke name="f"></invoke>',
        "<function_calls> and <toolcalls> are names of blocks",
    ],
)
def test_plain_tags_in_talk_are_content(text):
    message = parse_completion(text)
    assert (message["content"], message["tool_calls"]) == (text, [])
    assert message["malformed"] == []


def test_an_official_block_quoted_in_plain_calls_is_not_run():
    value = f"The format:\n\n{BLOCK}\n"
    markup = f'<tool_calls>\n<invoke name="w">\n<parameter name="t">{value}</parameter>\n'
    message = parse_completion(f"c\n\n{markup}</invoke>\n</tool_calls>{EOS}")
    assert [(n, json.loads(a)) for n, a in calls_of(message)] == [("w", {"t": value})]


@pytest.mark.parametrize("length", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("piece", HOSTILE, ids=repr)
def test_reading_takes_a_few_passes_over_a_long_text(piece, length):
    """It would take hours if the time grew with the square of the length."""
    long = piece * (length // len(piece))
    open_value = "\n\n" + CALL.partition("a<b")[0] + long
    for text in (f"\n\n{block(invoke('f', parameter('x', long)))}", open_value, long):
        parse_completion(text, "high" if text == long else "none")
