"""Tool calls as markup: what a call is made of, and its official text.

Nothing in the markup is escaped, so names and values stand in it as they are.
"""

import json
from dataclasses import dataclass
from typing import Any

from ds4mlx.chat.tokens import DSML


@dataclass(frozen=True)
class Parameter:
    """One argument; `text` is the string itself, or JSON where `is_string` is false."""

    key: str
    text: str
    is_string: bool


@dataclass(frozen=True)
class Call:
    """One tool call; `id` names it to its result and is no part of the markup."""

    name: str
    parameters: tuple[Parameter, ...]
    id: str = ""


def to_json(value: Any) -> str:
    """JSON as the official encoding writes it: spaces after , and :, no ASCII escapes.

    Raises TypeError, ValueError or RecursionError for what JSON cannot hold, which includes
    text that is no Unicode (half a surrogate pair).
    """
    text = json.dumps(value, ensure_ascii=False)
    text.encode()
    return text


def parameters_of(arguments: str) -> tuple[Parameter, ...]:
    """The parameters that a JSON object lists, in its order.

    Anything else than a JSON object becomes one string parameter named `arguments`.
    """
    try:
        values = json.loads(arguments)
        to_json(values)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        values = {"arguments": arguments}
    return tuple(_parameter(key, value) for key, value in values.items())


def render_calls(calls: tuple[Call, ...]) -> str:
    """The block of all calls of one message, without the blank line before it."""
    lines = "".join(_render_call(call) + "\n" for call in calls)
    return f"<{DSML}tool_calls>\n{lines}</{DSML}tool_calls>"


def _parameter(key: str, value: Any) -> Parameter:
    if isinstance(value, str):
        return Parameter(key, value, True)
    return Parameter(key, to_json(value), False)


def _render_call(call: Call) -> str:
    body = "\n".join(_render_parameter(parameter) for parameter in call.parameters)
    return f'<{DSML}invoke name="{call.name}">\n{body}\n</{DSML}invoke>'


def _render_parameter(parameter: Parameter) -> str:
    kind = "true" if parameter.is_string else "false"
    return (
        f'<{DSML}parameter name="{parameter.key}" string="{kind}">'
        f"{parameter.text}</{DSML}parameter>"
    )
