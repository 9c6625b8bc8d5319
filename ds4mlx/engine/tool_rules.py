"""Rules for answers with tool calls in their official text, or without any.

A call has the name of a tool that there is, and parameters that the tool declares, in their order,
each once and the required ones always. A text is free but for lists of choices; all other values are
JSON by the parameter's schema, or any JSON where that schema cannot be followed.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ds4mlx.chat.messages import read_tools
from ds4mlx.engine.rules import MARK, Rule
from ds4mlx.engine.schemas import guided, json_schema, target
from ds4mlx.errors import DataError

# What would be read as tool markup: in a value that is text, and in the text of an answer.
_MARKS = "DSML[｜|]"
_SPACE = r"[\s\x1c-\x1f]*"
_BLOCKS = "(tool_?calls?|function_?calls?)"
_CALLS = rf"({_MARKS}|<{_SPACE}invoke|<{_SPACE}\/{_SPACE}{_BLOCKS})"
_TEXTS = rf"""
CONTENT: /(?s:.*)/ & ~/(?s:.*){_CALLS}(?s:.*)/
BEFORE: /(?s:.*)\n\n</ & ~/(?s:.*){_CALLS}(?s:.*)/
VALUE: /(?s:.*)<\// & ~/(?s:.*){_MARKS}(?s:.*)/
"""
_BLOCK = f'{MARK} "tool_calls>\\n" calls "</" {MARK} "tool_calls>"'
_FREE = f"start: CONTENT | BEFORE {_BLOCK}"
_TAG_NAME = re.compile(r'[^"<>\n]+')
_TEXT = '"true\\">" VALUE'
_OTHERS = ("object", "array", "number", "integer", "boolean", "null")
_MOST_CHOICES = 1000  # longer lists are left to the model


def no_calls() -> Rule:
    """Any text in which nothing is, or could be read as, tool markup."""
    return Rule("start: CONTENT\n" + _TEXTS, "the choice of no tool")


def tool_calls(
    tools: Iterable[dict[str, Any]],
    *,
    required: bool = False,
    name: str | None = None,
    single: bool = False,
    schema: Any = None,
) -> Rule:
    """Any text, then perhaps calls of these tools, an OpenAI list of them.

    required: calls and nothing else. name: one call of this tool and nothing else. single: no
    more than one call. schema: JSON by this schema instead of text, or calls.
    Raises DataError for what is no list of tools, if none of them, or not the one that is named,
    can be called, and as `json_schema` does.
    """
    if schema is not None:
        json_schema(schema)
    answer = "" if schema is None else json.dumps(guided(schema))
    return _rule(read_tools(list(tools), "the tools"), required, name, single, answer)


@lru_cache(maxsize=32)  # agents send the same tools with every request
def _rule(
    tools: tuple[str, ...], required: bool, name: str | None, single: bool, answer: str
) -> Rule:
    """The rule for tools, and for a schema unless it is "", that are given in JSON."""
    functions = [json.loads(text) for text in tools]
    functions = [each for each in functions if name in (None, each.get("name"))]
    functions = [each for each in functions if _stands_in_a_tag(each.get("name"))]
    if not functions:
        raise DataError(f"there is no tool {name:.80} to call" if name else "no tool can be called")
    head = f'start: "\\n\\n<" {_BLOCK}'
    if not required and name is None:
        head = f"{head} | answer\nanswer: %json {answer}" if answer else _FREE
    count = "calls: call" if single or name is not None else "calls: call+"
    grammar = "\n".join([head, count, _TEXTS, _Calls().grammar(functions)])
    return Rule(grammar, "the choice of tools", of_all="answer" in head)


class _Calls:
    """The part of a grammar that is about calls, line by line."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._schemas: dict[str, str] = {}

    def grammar(self, functions: list[dict[str, Any]]) -> str:
        """The rule `call` of these functions, and the rules that it needs."""
        calls = [self._named("call", self._call(function)) for function in functions]
        return "\n".join([*self._lines, f"call: {' | '.join(calls)}", ""])

    def _named(self, kind: str, body: str) -> str:
        name = f"{kind}{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _call(self, function: dict[str, Any]) -> str:
        schema = _mapping(function.get("parameters"))
        needed = _list(schema.get("required"))
        lines = [
            self._parameter(key, value, schema) + ("" if key in needed else "?")
            for key, value in _mapping(schema.get("properties")).items()
            if _stands_in_a_tag(key)
        ]
        body = " ".join(lines)
        if all(line.endswith("?") for line in lines):
            body = f'("\\n" | {body})' if lines else '"\\n"'
        opening = _literal(f'invoke name="{function["name"]}">\n')
        return f'"<" {MARK} {opening} {body} "</" {MARK} "invoke>\\n"'

    def _parameter(self, key: str, schema: Any, root: dict[str, Any]) -> str:
        """The name of a rule for one parameter's tags and value, and the end of its line."""
        values = " | ".join(dict.fromkeys(self._values(schema, root, 8)))
        opening = _literal(f'parameter name="{key}" string="')
        return self._named("line", f'"<" {MARK} {opening} ({values}) {MARK} "parameter>\\n"')

    def _values(self, schema: Any, root: dict[str, Any], depth: int) -> list[str]:
        """The ways to go on behind string=", up to the </ of the closing tag."""
        if not isinstance(schema, dict) or not depth:
            return [_TEXT, self._json({"type": list(_OTHERS)}, root)]
        choices = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        if 0 < len(choices) <= _MOST_CHOICES:
            return [_choice(value) for value in choices]
        if (
            parts := _list(schema.get("anyOf"))
            + _list(schema.get("oneOf"))
            + _pointed(schema, root)
        ):
            return [way for part in parts for way in self._values(part, root, depth - 1)]
        return self._of_types(schema, root)

    def _of_types(self, schema: dict[str, Any], root: dict[str, Any]) -> list[str]:
        types = _list(schema.get("type")) or [schema.get("type")]
        known = [kind for kind in types if kind == "string" or kind in _OTHERS]
        known = known or ["string", *_OTHERS]
        ways = [_TEXT] if "string" in known else []
        if others := [kind for kind in known if kind != "string"]:
            ways.append(self._json({**schema, "type": others}, root))
        return ways

    def _json(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        """The way of a value in JSON."""
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        text = json.dumps(whole := {**shared, **schema})
        if text not in self._schemas:
            try:
                json_schema(whole)
            except DataError:
                whole = {"type": schema["type"]}
            self._schemas[text] = self._named("json", f"%json {json.dumps(guided(whole))}")
        return f'"false\\">" {self._schemas[text]} "</"'


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _stands_in_a_tag(name: Any) -> bool:
    """Whether tags with this name are read as such."""
    return isinstance(name, str) and "DSML" not in name and bool(_TAG_NAME.fullmatch(name))


def _choice(value: Any) -> str:
    """The way of one value that is given."""
    if isinstance(value, str):
        return _literal(f'true">{value}</')
    return _literal(f'false">{json.dumps(value, ensure_ascii=False)}</')


def _pointed(schema: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    """What the schema refers to, if anything."""
    try:
        found = target(schema, root, "the tool")
    except DataError:
        found = None
    return [] if found is None else [found]


def _literal(text: str) -> str:
    """A text in the grammar's language."""
    return json.dumps(text, ensure_ascii=False)
