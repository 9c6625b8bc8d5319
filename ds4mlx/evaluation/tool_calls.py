"""Tool-call tasks: a request that one or two of several declared tools answer.

A case is the conversation up to the request, the calls that it asks for, and how it goes on. A
model's answer is valid if it parses without malformed markup and every call names a declared tool
with exactly the parameters of its schema, each of its type; it is right if the calls are also
those asked for.
"""

import json
import random
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ds4mlx.chat import parse_completion
from ds4mlx.evaluation.words import ADJECTIVES, CITIES, NOUNS, PEOPLE, VALUES

TOOLS: list[dict[str, Any]] = json.loads(
    resources.files("ds4mlx.evaluation").joinpath("tools.json").read_text(encoding="utf-8")
)
SCHEMAS: dict[str, dict[str, Any]] = {
    **{kind: {"type": "string"} for kind in ("city", "person", "word", "phrase", "path")},
    "number": {"type": "integer"},
    "flag": {"type": "boolean"},
    "numbers": {"type": "array", "items": {"type": "integer"}},
    **{kind: {"type": "array", "items": {"type": "string"}} for kind in ("people", "words")},
    "point": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}},
}
TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}


@dataclass(frozen=True)
class ToolCase:
    """A request with its tools, and the official continuation of the conversation."""

    tools: list[dict[str, Any]]  # OpenAI's form
    request: dict[str, Any]  # the user's message
    call: dict[str, Any]  # the assistant's message with the calls
    results: list[dict[str, Any]]  # the tools' messages
    answer: dict[str, Any]  # the assistant's last message

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation."""
        return [self.request, self.call, *self.results, self.answer]


def case(rng: random.Random) -> ToolCase:
    """A random case: two to four tools, one call, or in one case of six two."""
    offered = rng.sample(TOOLS, rng.randint(2, 4))
    used = offered[: 2 if rng.random() < 1 / 6 else 1]
    wanted = [_wanted(rng, tool) for tool in used]
    results = [{key: _number(rng) for key in tool["result"]} for tool in used]
    rng.shuffle(offered)
    pairs = list(zip(used, wanted, results, strict=True))
    return ToolCase(
        tools=[_declared(tool) for tool in offered],
        request={"role": "user", "content": " ".join(_request(rng, t, w) for t, w, _ in pairs)},
        call={
            "role": "assistant",
            "content": "",
            "reasoning_content": " ".join(f"I call {tool['name']}." for tool in used),
            "tool_calls": [_call(n, tool["name"], w) for n, (tool, w, _) in enumerate(pairs)],
        },
        results=[
            {"role": "tool", "tool_call_id": f"call_{n}", "content": json.dumps(result)}
            for n, result in enumerate(results)
        ],
        answer={
            "role": "assistant",
            "reasoning_content": "The tool has answered.",
            "content": " ".join(t["answer"].format(**w, **r) for t, w, r in pairs),
        },
    )


def judge(case: ToolCase, completion: str, thinking: str) -> tuple[bool, bool]:
    """Whether a completion of the request's prompt is valid, and whether it is right."""
    message = parse_completion(completion, thinking)
    calls = [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in message["tool_calls"]
    ]
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
    valid = bool(calls) and not message["malformed"]
    valid = valid and all(n in declared and fits(a, declared[n]) for n, a in calls)
    asked = [(c["function"]["name"], c["function"]["arguments"]) for c in case.call["tool_calls"]]
    return valid, valid and calls == [(name, json.loads(arguments)) for name, arguments in asked]


def fits(arguments: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether arguments are an object of exactly the schema's properties, each of its type."""
    properties = schema["properties"]
    return set(arguments) == set(properties) and all(
        _is_a(value, properties[key]) for key, value in arguments.items()
    )


def _is_a(value: Any, schema: dict[str, Any]) -> bool:
    kind = TYPES[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if kind is list:
        return all(_is_a(item, schema["items"]) for item in value)
    return kind is not dict or fits(value, schema)


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    properties = {key: SCHEMAS[kind] for key, kind in tool["parameters"].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def _call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _wanted(rng: random.Random, tool: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(rng, kind) for key, kind in tool["parameters"].items()}


def _number(rng: random.Random) -> int:
    return rng.randint(1, 99)


def _value(rng: random.Random, kind: str) -> Any:
    several = range(rng.randint(2, 4))
    makers: dict[str, Any] = {
        "city": lambda: rng.choice(CITIES),
        "person": lambda: rng.choice(PEOPLE),
        "word": lambda: rng.choice(VALUES),
        "phrase": lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        "path": lambda: f"src/{rng.choice(NOUNS)}.py",
        "number": lambda: _number(rng),
        "flag": lambda: rng.random() < 0.5,
        "numbers": lambda: [_number(rng) for _ in several],
        "people": lambda: [rng.choice(PEOPLE) for _ in several],
        "words": lambda: [rng.choice(VALUES) for _ in several],
        "point": lambda: {"x": _number(rng), "y": _number(rng)},
    }
    return makers[kind]()


def _request(rng: random.Random, tool: dict[str, Any], wanted: dict[str, Any]) -> str:
    said = {key: _said(key, value) for key, value in wanted.items()}
    return rng.choice(tool["requests"]).format(**said)


def _said(key: str, value: Any) -> str:
    """A value as a person says it: not urgent; x 3, y 5; red, blue and green."""
    if isinstance(value, bool):
        return key if value else f"not {key}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:-1])) + f" and {value[-1]}"
    return str(value)
