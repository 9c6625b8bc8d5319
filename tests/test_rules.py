"""Rules for answers: JSON by a schema, what a client has begun, and what is refused."""

import json

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from ruled import TOOLS, TREE, spelled, written

from ds4mlx import DataError
from ds4mlx.engine.rules import RuleError
from ds4mlx.engine.schemas import json_object, json_schema
from ds4mlx.engine.tool_rules import no_calls, tool_calls
from ds4mlx.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(embedded_dir):
    return Tokenizer.from_dir(embedded_dir)


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


@pytest.mark.parametrize("tens", range(10))
def test_answers_of_random_schemas_are_valid(tokenizer, tens):
    for seed in range(10 * tens, 10 * tens + 10):
        schema = random_object(np.random.default_rng(seed), 0) | {"$defs": {"tree": TREE}}
        answer = written(tokenizer, json_schema(schema), seed)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
        validator.validate(json.loads(answer))


def test_json_mode_gives_an_object(tokenizer):
    answers = [written(tokenizer, json_object(), seed) for seed in range(5)]
    assert all(isinstance(json.loads(answer), dict) for answer in answers)


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
        ({"type": "string", "pattern": "("}, r"regex parse error: \( error: unclosed group$"),
        ({"type": "string", "pattern": "a(?!b)"}, r"error: a\(\?!b\) error: look-around, .* sup"),
        ({"type": "string", "pattern": "x" * 900 + "(?=y)"}, "error: x{120} error: look-around"),
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
def test_hostile_schemas_are_refused_or_followed(tokenizer, name):
    """One that is followed up as it is written has no end, or none that anyone waits for."""
    random = np.random.default_rng(1)
    try:
        mask = json_schema(HOSTILE[name]).start(tokenizer)
        for _ in range(20):
            allowed = np.flatnonzero(np.array(mask.allowed(tokenizer.vocab_size)))
            assert len(allowed)
            mask.took(int(random.choice(allowed)))
            if mask.done:
                break
    except DataError as error:
        assert str(error).startswith("the JSON schema ")


def test_a_mask_is_as_wide_as_the_logits(tokenizer):
    """Whatever the model's head is beyond the vocabulary, it is not drawn."""
    for width in (tokenizer.vocab_size + 77, tokenizer.vocab_size - 5):
        allowed = no_calls().start(tokenizer).allowed(width)
        assert allowed.shape == (width,) and allowed.dtype == mx.bool_
        assert not np.array(allowed[tokenizer.vocab_size :]).any()
