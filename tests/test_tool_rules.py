"""Rules for tool calls: which may be written, how they are spelled, and what is refused."""

import json

import jsonschema
import pytest
from ruled import READ, TOOLS, TREE, spelled, written

from ds4mlx import DataError
from ds4mlx.chat import parse_completion
from ds4mlx.chat.tokens import DSML
from ds4mlx.engine.tool_rules import no_calls, tool_calls
from ds4mlx.text.tokenizer import Tokenizer

NAMES = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
CHOICES = {
    "required": {"required": True},
    "one required": {"required": True, "single": True},
    "named": {"name": "ns.many-things"},
    "named without parameters": {"name": "now"},
    "at most one": {"single": True},
    "as many as one likes": {},
}


@pytest.fixture(scope="module")
def tokenizer(embedded_dir):
    return Tokenizer.from_dir(embedded_dir)


@pytest.mark.parametrize("choice", CHOICES)
def test_calls_are_official_and_of_the_tools_that_there_are(tokenizer, choice):
    options, counts = CHOICES[choice], []
    rule = tool_calls(TOOLS, **options)
    free = not options.keys() & {"required", "name"}
    for seed in range(8):
        begun = f"So:\n\n<{DSML}tool_calls>\n" if free and seed % 2 else ""
        text = written(tokenizer, rule, seed, begun)
        message = parse_completion(text)
        assert message["malformed"] == []
        counts.append(len(message["tool_calls"]))
        for call in message["tool_calls"]:
            name, values = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert name == options.get("name", name)
            assert values.keys() <= NAMES[name].get("properties", {}).keys()
            assert values.keys() >= set(NAMES[name].get("required", ()))
            if name == "read_file":
                jsonschema.validate(values, READ)
            if "odd key" in values:
                jsonschema.validate(values["odd key"], TREE | {"$defs": {"tree": TREE}})
        if not free:
            assert counts[-1] and message["content"] == ""
        elif begun:
            assert counts[-1] and message["content"] == "So:"
        if "single" in options or "name" in options:
            assert counts[-1] <= 1


OFFICIAL = f"""

<{DSML}tool_calls>
<{DSML}invoke name="read_file">
<{DSML}parameter name="path" string="true">a </b> c</{DSML}parameter>
<{DSML}parameter name="lines" string="false">12</{DSML}parameter>
</{DSML}invoke>
<{DSML}invoke name="now">

</{DSML}invoke>
</{DSML}tool_calls>"""


def test_json_by_a_schema_or_calls(tokenizer):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    rule = tool_calls(TOOLS, schema=schema)
    for seed in range(6):
        message = parse_completion(written(tokenizer, rule, seed, "" if seed % 2 else "{"))
        assert message["malformed"] == []
        if not message["tool_calls"]:
            jsonschema.validate(json.loads(message["content"]), schema)
    assert spelled(tokenizer, rule, '{"n": 3}') and spelled(tokenizer, rule, OFFICIAL)
    assert not spelled(tokenizer, rule, "text") and not spelled(tokenizer, rule, "{}" + OFFICIAL)
    with pytest.raises(DataError, match="the JSON schema cannot be followed"):
        tool_calls(TOOLS, schema={"not": {}})


def test_what_the_official_encoding_writes_may_be_written(tokenizer):
    single = OFFICIAL.replace(f'<{DSML}invoke name="now">\n\n</{DSML}invoke>\n', "")
    for text in ("", "Let me see.\n\nFirst:"):
        assert spelled(tokenizer, tool_calls(TOOLS), text + OFFICIAL)
        assert spelled(tokenizer, tool_calls(TOOLS, single=True), text + single)
    assert spelled(tokenizer, tool_calls(TOOLS, required=True), OFFICIAL)
    assert not spelled(tokenizer, tool_calls(TOOLS, single=True), OFFICIAL)
    assert not spelled(tokenizer, tool_calls(TOOLS, required=True), "text" + OFFICIAL)
    assert not spelled(tokenizer, tool_calls(TOOLS, name="flags"), OFFICIAL)
    assert not spelled(tokenizer, tool_calls(TOOLS, required=True), "")
    assert not spelled(tokenizer, tool_calls(TOOLS[1:]), OFFICIAL)
    assert not spelled(tokenizer, no_calls(), OFFICIAL)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_calls>\n<invoke name="now">\n</invoke>\n</tool_calls>',
        '<invoke name="now"></invoke>',
        '<|DSML|invoke name="now">',
        "< function_calls ></ function_calls >",
        "<think>",
    ],
)
def test_no_calls_in_any_spelling(tokenizer, text):
    assert spelled(tokenizer, no_calls(), "Text, <b>tags</b>,\n\n</ and `code`.")
    assert not spelled(tokenizer, no_calls(), "Text:\n\n" + text)


def test_tools_that_cannot_be_called_are_refused():
    for tools, options, cause in [
        (TOOLS, {"name": "write"}, "there is no tool write to call"),
        ([], {"required": True}, "no tool can be called"),
        ([{"type": "function", "function": {"name": 'a"b'}}], {}, "no tool can be called"),
        ([{"type": "function"}], {}, "needs an object as its function"),
    ]:
        with pytest.raises(DataError, match=cause):
            tool_calls(tools, **options)
