"""Tool calls as markup: what a call is made of, and its official text.

Nothing in the markup is escaped, so names and values stand in it as they are.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from ds4mlx.chat.segments import Segment, joined, markup, outside
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


def is_json(text: str) -> bool:
    """Whether a text is JSON that can be read here: no numbers too long, no nesting too deep."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def value_of(parameter: Parameter) -> Any:
    """The JSON value of an argument; what is no JSON is its text."""
    if parameter.is_string or not is_json(parameter.text):
        return parameter.text
    return json.loads(parameter.text)


def argument(parameter: Parameter) -> str:
    """The JSON text of an argument; what is no JSON is its text."""
    if not parameter.is_string and is_json(parameter.text):
        return parameter.text
    return json.dumps(parameter.text, ensure_ascii=False)


def new_id() -> str:
    """An id for a call which nobody can guess."""
    return f"call_{secrets.token_hex(16)}"


def render_calls(calls: tuple[Call, ...]) -> str:
    """The block of all calls of one message, without the blank line before it."""
    return joined(call_segments(calls))


def call_segments(calls: tuple[Call, ...]) -> list[Segment]:
    """The same in pieces: names, keys and values are from outside."""
    segments = [markup(f"<{DSML}tool_calls>\n")]
    for call in calls:
        segments += [markup(f'<{DSML}invoke name="'), outside(call.name), markup('">\n')]
        for index, parameter in enumerate(call.parameters):
            segments += _parameter_segments(parameter, "\n" if index else "")
        segments.append(markup(f"\n</{DSML}invoke>\n"))
    return [*segments, markup(f"</{DSML}tool_calls>")]


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(name)


def _parameter(key: str, value: Any) -> Parameter:
    if isinstance(value, str):
        return Parameter(key, value, True)
    return Parameter(key, to_json(value), False)


def _parameter_segments(parameter: Parameter, gap: str) -> list[Segment]:
    kind = "true" if parameter.is_string else "false"
    return [
        markup(f'{gap}<{DSML}parameter name="'),
        outside(parameter.key),
        markup(f'" string="{kind}">'),
        outside(parameter.text),
        markup(f"</{DSML}parameter>"),
    ]
