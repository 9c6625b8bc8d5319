"""Tool calls read out of a model's text.

Accepts slips of the markup (ASCII or missing bars, plain XML tags, other white space), but only
calls that are complete: one whose closing tag is missing is never returned.
"""

import re
from dataclasses import dataclass

from ds4mlx.chat.markup import Call, Parameter
from ds4mlx.chat.tokens import DSML

_BARS = "[｜|]?DSML[｜|]"
_MARK = f"(?:{_BARS})?"
# The official opening is preferred, so that text before it may quote the others. Plain tags count
# only at the start of a line, lest a sentence about them be taken for a call.
_INSIDE = rf"(?=\s*<(?:{_MARK}invoke|/{_MARK}tool_calls)\b)"
_OFFICIAL_BLOCK = re.compile(rf"<{DSML}tool_calls>{_INSIDE}")
_LAX_BLOCK = re.compile(rf"(?:<{_BARS}tool_calls\s*>|^<tool_calls\s*>){_INSIDE}", re.MULTILINE)
_BLOCK_END = re.compile(rf"\s*</{_MARK}tool_calls\s*>")
_INVOKE = re.compile(rf'\s*<{_MARK}invoke\s+name="(.*?)"\s*>')
_INVOKE_END = re.compile(rf"\s*</{_MARK}invoke\s*>")
_PARAMETER = re.compile(rf"\s*<{_MARK}parameter\s+(?=name=)")
_TYPED = re.compile(r'name="(.*?)" string="(true|false)">(.*)', re.DOTALL)
_UNTYPED = re.compile(r'name="([^"]*)"\s*>(.*)', re.DOTALL)
_OFFICIAL_CLOSE = re.compile(f"</{DSML}parameter>")
_MARKED_CLOSE = re.compile(rf"</{_BARS}parameter\s*>")
_PLAIN_CLOSE = re.compile(r"</parameter\s*>")


@dataclass(frozen=True)
class CallBlock:
    """A block of calls, at text[start:end]; `closed` tells that its closing tag was there."""

    calls: tuple[Call, ...]
    start: int
    end: int
    closed: bool


def find_calls(text: str) -> CallBlock | None:
    """The first block of calls, or None; not closed, it ends behind its last complete call."""
    opening = _OFFICIAL_BLOCK.search(text) or _LAX_BLOCK.search(text)
    if opening is None:
        return None
    # The strictest closing tag in use ends the values, so a value may quote the laxer ones.
    closes = (_OFFICIAL_CLOSE, _MARKED_CLOSE, _PLAIN_CLOSE)
    close = next((tag for tag in closes if tag.search(text, opening.end())), _OFFICIAL_CLOSE)
    calls, at = [], opening.end()
    while found := _read_call(text, at, close):
        call, at = found
        calls.append(call)
    end = _BLOCK_END.match(text, at)
    return CallBlock(tuple(calls), opening.start(), end.end() if end else at, end is not None)


def _read_call(text: str, at: int, close: re.Pattern[str]) -> tuple[Call, int] | None:
    head = _INVOKE.match(text, at)
    if head is None:
        return None
    parameters, at = [], head.end()
    while opening := _PARAMETER.match(text, at):
        closing = close.search(text, opening.end())
        parameter = closing and _read_parameter(text[opening.end() : closing.start()])
        if not closing or not parameter:
            return None
        parameters.append(parameter)
        at = closing.end()
    end = _INVOKE_END.match(text, at)
    return (Call(head[1], tuple(parameters)), end.end()) if end else None


def _read_parameter(text: str) -> Parameter | None:
    if typed := _TYPED.fullmatch(text):
        return Parameter(typed[1], typed[3], typed[2] == "true")
    if untyped := _UNTYPED.fullmatch(text):
        return Parameter(untyped[1], untyped[2], True)
    return None
