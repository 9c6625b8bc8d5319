"""Which rule an answer must obey, by what protocols say of tools and formats.

The prompt is the same with and without one: what the tokens may be is all that changes, so that a
history keeps its prefix.
"""

from dataclasses import dataclass
from typing import Any

from ds4mlx.engine.rules import Rule
from ds4mlx.engine.schemas import json_object, json_schema
from ds4mlx.engine.tool_rules import no_calls, tool_calls
from ds4mlx.errors import DataError
from ds4mlx.server.errors import Refusal
from ds4mlx.server.offered import name_of


@dataclass(frozen=True)
class Allowed:
    """A choice of calls of some tools only. names: theirs in the prompt. mode: auto or required."""

    names: frozenset[str]
    mode: str

    @classmethod
    def of(cls, said: Any) -> "Allowed":
        """As clients say it, chat's and Responses'. Raises Refusal for what cannot be read."""
        said = said if isinstance(said, dict) else {}
        mode, tools = said.get("mode"), said.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, list):
            message = (
                "tool_choice: allowed_tools needs auto or required as its mode, and a list of tools"
            )
            raise Refusal(400, message, param="tool_choice")
        return cls(frozenset(name for tool in tools if (name := name_of(tool))), mode)


# auto, none, required, the name in the prompt of the one tool to call, or those that are allowed.
Choice = str | tuple[str] | Allowed


def rule_of(
    tools: list[dict[str, Any]],
    choice: Choice,
    parallel: bool | None,
    schema: dict[str, Any] | bool | None,
) -> Rule | None:
    """The rule, None where the answer is free.

    tools: OpenAI's list of those offered. parallel: False for one call at most. schema: of the
    answer's text; True for any JSON object. A call that is required leaves no text to have a schema;
    one that is not may come instead of it.
    Raises DataError, naming what cannot be obeyed.
    """
    some = tools
    if isinstance(choice, Allowed):
        some = [tool for tool in tools if tool["function"]["name"] in choice.names]
        choice = choice.mode
    named = choice[0] if isinstance(choice, tuple) else None
    if named is not None or choice == "required":
        if not some:
            raise DataError("a tool must be called, and none is offered")
        return tool_calls(some, required=True, name=named, single=parallel is False)
    if choice == "none" or not some:
        if schema is not None:
            return json_object() if schema is True else json_schema(schema)
        return no_calls() if tools else None
    if schema is None and parallel is not False and len(some) == len(tools):
        return None
    schema = {"type": "object"} if schema is True else schema
    return tool_calls(some, single=parallel is False, schema=schema)
