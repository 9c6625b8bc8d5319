"""One tool call read out of a model's text, at the place where it opens.

A call counts only if it is complete: each value closed by its exact closing tag, the call closed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ds4mlx.chat import spelling
from ds4mlx.chat.markup import Call, Parameter, to_json

Span = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """What became of a call that opens at `start`.

    call: None where it is broken, which `fault` explains; name: "" where not even that was read.
    end: behind the call, or from where to look for the next one. slips: what was not official.
    values: the spans of text[...] that are no markup: name, keys and values.
    """

    name: str
    start: int
    end: int
    call: Call | None = None
    fault: str = ""
    slips: tuple[str, ...] = ()
    values: tuple[Span, ...] = ()


def read_call(text: str, at: int, level: int, close: int) -> Reading:
    """The call at `at`, behind white space; `level` and `close` as in `spelling.value_end`."""
    head = spelling.call_at(text, at)
    if head is None:
        return Reading("", at, at, fault="its opening tag cannot be read")
    body = _json_body(text, head, level) or _parameters(text, head, level, close)
    if body.fault:
        return Reading(head.name, at, body.end, fault=body.fault)
    end = spelling.CALL_END.match(text, body.end)
    if end is None:
        return Reading(head.name, at, body.end, fault="it is not closed")
    call, slips = Call(head.name, tuple(body.parameters)), (*head.slips, *body.slips)
    return Reading(head.name, at, end.end(), call, "", slips, (head.key, *body.values))


@dataclass
class _Body:
    """What stands between the tags of a call; `end` is where its closing tag belongs."""

    parameters: list[Parameter]
    slips: list[str]
    values: list[Span]
    end: int
    fault: str = ""


def _parameters(text: str, head: spelling.Opening, level: int, close: int) -> _Body:
    """Read on behind a broken value too: the call's other values may quote calls."""
    body = _Body([], [], [], head.end)
    while opening := spelling.parameter_at(text, body.end):
        end = spelling.value_end(text, opening.end, level, close)
        if end is None or not end.is_closed:
            body.fault = body.fault or f"the value of {opening.name:.80} is not closed"
        if end is None:
            body.end = len(text)
            break
        value = text[opening.end : end.start]
        body.parameters.append(Parameter(opening.name, value, opening.is_string is not False))
        body.values += [opening.key, (opening.end, end.start)]
        body.slips += opening.slips
        if opening.is_string is None:
            body.slips.append(f"{opening.name:.80} without string=, read as text")
        body.end = end.end if end.is_closed else end.start
    return body


def _json_body(text: str, head: spelling.Opening, level: int) -> _Body | None:
    """The arguments of a call that are one JSON object instead of parameters."""
    if not _BRACE.match(text, head.end):
        return None
    edge = spelling.call_end(text, head.end, level)
    limit = edge.start if edge else len(text)
    if not (edge and edge.is_closed):
        limit = spelling.lax_call_end(text, head.end, limit)
    raw = text[head.end : limit]
    try:
        pairs = _DECODER.decode(raw).pairs
        parameters = [_parameter(key, value) for key, value in pairs]
    except (ValueError, RecursionError):
        return _Body([], [], [], head.end, "its JSON cannot be read")
    span = (head.end, head.end + len(raw))
    return _Body(parameters, [f"JSON as the body of {head.name:.80}"], [span], span[1])


@dataclass
class _Pairs:
    """A JSON object's keys and values, repeated ones too."""

    pairs: list[tuple[str, Any]]


def _parameter(key: str, value: Any) -> Parameter:
    return Parameter(key, value if isinstance(value, str) else _json(value), isinstance(value, str))


def _json(value: Any) -> str:
    return to_json(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(inner) for key, inner in value.pairs}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse(text)
    return value


_BRACE = re.compile(r"\s*\{")
_HOOK: Callable[[list[tuple[str, Any]]], Any] = _Pairs
_DECODER = json.JSONDecoder(
    object_pairs_hook=_HOOK, parse_constant=_refuse, parse_float=_finite, strict=True
)
