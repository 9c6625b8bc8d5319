"""Rules for answers: JSON by a schema, tool calls, and what is refused."""

import json
import time

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from ds4mlx import DataError
from ds4mlx.chat import parse_completion
from ds4mlx.chat.tokens import DSML
from ds4mlx.engine.rules import Rule, RuleError
from ds4mlx.engine.schemas import json_object, json_schema
from ds4mlx.engine.tool_rules import no_calls, tool_calls
from ds4mlx.text.tokenizer import Tokenizer

ENOUGH = 60  # tokens after which an answer hurries to its end


@pytest.fixture(scope="module")
def tokenizer(embedded_dir):
    return Tokenizer.from_dir(embedded_dir)


@pytest.fixture(scope="module")
def write(tokenizer):
    """An answer of a rule by random logits, in which what may end something soon gets likely."""
    vocab = tokenizer.vocab_size
    spellings = [tokenizer.token_bytes(token) for token in range(vocab)]
    ends = np.array([s[:1] in (b'"', b"}", b"]") or s == b"</" for s in spellings])
    special = np.array([tokenizer.is_added(token) for token in range(vocab)])

    def written(rule: Rule, seed: int, begun: str = "") -> str:
        random, mask, tokens = np.random.default_rng(seed), rule.start(tokenizer), []
        for token in tokenizer.encode(begun):
            assert mask.allowed(vocab)[token].item()
            tokens.append(token)
            mask.took(token)
        while len(tokens) < 2000:
            hurry = len(tokens) / ENOUGH * 8
            logits = random.gumbel(size=vocab) + hurry * (ends + 2 * special)
            logits[~np.array(mask.allowed(vocab))] = -np.inf
            token = int(logits.argmax())
            assert np.isfinite(logits[token])
            if token == tokenizer.eos_token_id:
                return tokenizer.decode(tokens)
            tokens.append(token)
            mask.took(token)
        pytest.fail(f"no end to {tokenizer.decode(tokens)[:300]}")

    return written


# JSON


def random_schema(random, depth=0):
    """A schema of the supported parts."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "length", "pattern"]
    kinds += ["range", "multiple", "format", "object", "array", "anyOf", "allOf", "ref", "types"]
    return SCHEMAS[random.choice(kinds[:12] if depth > 2 else kinds)](random, depth + 1)


def random_object(random, depth):
    keys = [f"k{n}" for n in range(random.integers(0, 5))]
    schema = {
        "type": "object",
        "properties": {key: random_schema(random, depth) for key in keys},
        "required": [key for key in keys if random.integers(2)],
    }
    if random.integers(2):
        schema["additionalProperties"] = bool(random.integers(2))
    return schema


def random_array(random, depth):
    least = int(random.integers(0, 3))
    schema = {"type": "array", "items": random_schema(random, depth), "minItems": least}
    return schema | ({"maxItems": least + 2} if random.integers(2) else {})


def random_all(random, depth):
    parts = [random_object(random, depth) for _ in range(2)]
    renamed = {f"other{key}": value for key, value in parts[1]["properties"].items()}
    first = {key: value for key, value in parts[0].items() if key != "additionalProperties"}
    return {"allOf": [first, {"type": "object", "properties": renamed}]}


SCHEMAS = {
    **{
        kind: lambda random, depth, kind=kind: {"type": kind}
        for kind in ("string", "integer", "number", "boolean", "null")
    },
    "enum": lambda random, depth: {"enum": ["a", 'b"\\\n', 3, None, [1, {"é": 2.5}]]},
    "const": lambda random, depth: {"const": {"深": ["x", 1]}},
    "length": lambda random, depth: {"type": "string", "minLength": 2, "maxLength": 9},
    "pattern": lambda random, depth: {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]+(x|y)?$"},
    "range": lambda random, depth: {"type": "number", "exclusiveMinimum": -2.5, "maximum": 17},
    "multiple": lambda random, depth: {"type": "integer", "multipleOf": 7, "minimum": 3},
    "format": lambda random, depth: {
        "type": "string",
        "format": str(random.choice(["date", "uuid", "ipv4", "time", "date-time"])),
    },
    "object": random_object,
    "array": random_array,
    "anyOf": lambda random, depth: {"anyOf": [random_schema(random, depth) for _ in range(3)]},
    "allOf": random_all,
    "ref": lambda random, depth: {"$ref": "#/$defs/tree"},
    "types": lambda random, depth: {"type": ["string", "null", "integer"]},
}
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["name"],
}


@pytest.mark.parametrize("tens", range(10))
def test_answers_of_random_schemas_are_valid(write, tens):
    for seed in range(10 * tens, 10 * tens + 10):
        schema = random_object(np.random.default_rng(seed), 0) | {"$defs": {"tree": TREE}}
        answer = write(json_schema(schema), seed)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
        validator.validate(json.loads(answer))


def test_json_mode_gives_an_object(write):
    answers = [write(json_object(), seed) for seed in range(5)]
    assert all(isinstance(json.loads(answer), dict) for answer in answers)


def spelled(tokenizer, rule, text):
    """Whether a rule lets a text, in the tokenizer's own tokens, through to its end."""
    mask = rule.start(tokenizer)
    for token in [*tokenizer.encode(text), tokenizer.eos_token_id]:
        if not mask.allowed(tokenizer.vocab_size)[token].item():
            return False
        mask.took(token)
    return mask.done


def test_json_may_be_spaced_but_not_without_end(tokenizer):
    values = {"a": [1, {"b": "x"}], "c": None}
    for indent in (None, 2, 4):
        assert spelled(tokenizer, json_object(), json.dumps(values, indent=indent))
    assert spelled(tokenizer, json_object(), json.dumps(values, separators=(",", ":")))
    assert not spelled(tokenizer, json_object(), '{"a":' + "\n" * 9 + "1}")


NUMBER = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "s": {"type": "string"}}}
NUMBER |= {"required": ["n"], "additionalProperties": False}


def test_what_is_begun_is_a_part_of_what_a_schema_describes(tokenizer):
    text = '{"n": 1, "s": "\\"<b>\\n é"}'
    rules = [json_schema(NUMBER), json_object(), tool_calls(TOOLS, schema=NUMBER)]
    for rule in rules:
        for at in range(len(text) + 1):
            assert spelled(tokenizer, rule.after(text[:at]), text[at:]), text[:at]
        assert spelled(tokenizer, rule.after("\n {"), '"n": 2}')
        assert not spelled(tokenizer, rule.after('{"n": '), '{"n": 1}')
        for begun in ("Here:", '{"n": 1} so', "```json\n", '{"n": 1, }'):
            with pytest.raises(RuleError, match="cannot go on to one that obeys"):
                rule.after(begun).start(tokenizer)
    with pytest.raises(RuleError, match="the JSON schema"):
        json_schema(NUMBER).after('{"n": 3').start(tokenizer)


def test_what_is_begun_is_a_text_before_calls(tokenizer):
    calls = tool_calls(TOOLS, required=True)
    assert calls.after("I look.") == calls and no_calls().after("DSML|") == no_calls()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"if": {}, "then": False}}}, '"if", "then"'),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "string", "not": {}, "x-guidance": {"lenient": True}}, '"not"'),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "("}, "unclosed group|regex parse error"),
        ({"type": "string", "pattern": "a(?!b)"}, "regex parse error"),
        ({"type": "strin"}, "strin"),
        ({"type": "object", "required": "x"}, "required"),
        ({"$ref": "#"}, "nothing fulfils it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing fulfils it"),
        ({"$ref": "https://example.org/x"}, "https://example.org/x, which is nowhere in it"),
        ({"$ref": "#/$defs/b", "$defs": {}}, "#/\\$defs/b, which is nowhere"),
        (False, "is false, which nothing"),
        ({"type": "array", "items": {}, "minItems": 10**9}, "minItems of 1000000000"),
        ({"type": "string", "minLength": 10**9}, "minLength"),
        ({"type": "number", "minimum": float("nan")}, "is not JSON"),
        ({"type": "string", "const": "\ud800"}, "is not JSON|cannot be followed"),
        ([], "must be an object"),
        ("{}", "must be an object"),
        ({"const": {1, 2}}, "is not JSON"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(schema, named):
    with pytest.raises(DataError, match=f"the JSON schema .*({named})") as refused:
        json_schema(schema)
    assert str(refused.value).count("the JSON schema") == 1


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chained(count):
    """Definitions each of which has a pattern and refers to the next one."""
    parts = {
        f"d{n}": {"pattern": f".*a.{{{n}}}b", "$ref": f"#/$defs/d{n + 1}"} for n in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{count}": {"type": "string"}}}


HOSTILE = {
    "enum": {"enum": [f"value {n}" for n in range(20_000)]},
    "huge enum": {"enum": [f"value {n}" * 3 for n in range(200_000)]},
    "properties": {"type": "object", "properties": {f"k{n}": {} for n in range(3000)}},
    "nested": nested(90),
    "nested too deeply": nested(400),
    "nested far too deeply": nested(3000),
    "patterns": {"type": "string", "allOf": [{"pattern": f".*a.{{{n}}}b"} for n in range(40)]},
    "chained patterns": chained(40),
    "repeated": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "stars": {"type": "string", "pattern": "^((((a*)*)*)*)*(.{0,500}){0,500}$"},
    "multiple": {"type": "integer", "multipleOf": 1_000_000_007},
    "product": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{n}{m}": {"type": "string"}}} for m in range(6)]}
            for n in range(9)
        ]
    },
    "doubling": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)},
            "d40": {"type": "string", "pattern": "x"},
        },
    },
    "endless": {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_less_than_a_second_of_work(tokenizer, name):
    """Processor time, so that a busy machine does not matter; refused or followed for a while."""
    random, before = np.random.default_rng(1), time.thread_time()
    try:
        mask = json_schema(HOSTILE[name]).start(tokenizer)
        for _ in range(20):
            allowed = np.flatnonzero(np.array(mask.allowed(tokenizer.vocab_size)))
            mask.took(int(random.choice(allowed)))
            if mask.done:
                break
    except DataError as error:
        assert str(error).startswith("the JSON schema ")
    assert time.thread_time() - before < 1.5


# Tool calls

READ = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "integer", "minimum": 0},
        "mode": {"enum": ["r", 'quoted "</b>"\n', 3, None]},
        "only": {"anyOf": [{"type": "array", "items": {"type": "boolean"}}, {"type": "null"}]},
    },
    "required": ["path"],
}
MANY = {
    "type": "object",
    "properties": {
        "any": {},
        "unsupported": {"type": "object", "not": {}},
        "odd key": {"$ref": "#/$defs/tree"},
        'no "tag" > can': {"type": "string"},
        "gone": {"$ref": "#/$defs/nowhere", "type": "integer"},
        "self": {"$ref": "#/properties/self"},
    },
    "required": ["odd key"],
    "$defs": {"tree": TREE},
}
TOOLS = [
    {"type": "function", "function": {"name": "read_file", "parameters": READ}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "ns.many-things", "parameters": MANY}},
    {"type": "function", "function": {"name": "flags", "parameters": {
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}}}},
]  # fmt: skip
NAMES = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
CHOICES = {
    "required": {"required": True},
    "one required": {"required": True, "single": True},
    "named": {"name": "ns.many-things"},
    "named without parameters": {"name": "now"},
    "at most one": {"single": True},
    "as many as one likes": {},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_calls_are_official_and_of_the_tools_that_there_are(write, choice):
    options, counts = CHOICES[choice], []
    rule = tool_calls(TOOLS, **options)
    free = not options.keys() & {"required", "name"}
    for seed in range(8):
        begun = f"So:\n\n<{DSML}tool_calls>\n" if free and seed % 2 else ""
        text = write(rule, seed, begun)
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


def test_json_by_a_schema_or_calls(write, tokenizer):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    rule = tool_calls(TOOLS, schema=schema)
    for seed in range(6):
        message = parse_completion(write(rule, seed, "" if seed % 2 else "{"))
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


def test_a_mask_is_as_wide_as_the_logits(tokenizer):
    """Whatever the model's head is beyond the vocabulary, it is not drawn."""
    for width in (tokenizer.vocab_size + 77, tokenizer.vocab_size - 5):
        allowed = no_calls().start(tokenizer).allowed(width)
        assert allowed.shape == (width,) and allowed.dtype == mx.bool_
        assert not np.array(allowed[tokenizer.vocab_size :]).any()
