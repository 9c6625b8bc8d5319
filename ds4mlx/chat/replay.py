"""Tool calls exactly as they were sampled, so that a history is rendered byte for byte.

What a client sends back is JSON; the model's own spelling of the calls cannot be told from it.
"""

from collections.abc import Mapping
from typing import Any

from ds4mlx.chat.calls import find_calls
from ds4mlx.chat.markup import Call, value_of
from ds4mlx.chat.parse import split_reasoning
from ds4mlx.chat.segments import Segment, divided
from ds4mlx.chat.tokens import EOS


def sampled_calls(text: str, thinking: str = "none") -> str:
    """The calls in a completion `text`, with the blank line before them, up to the turn's end.

    Empty if there are none, one is broken, or other text follows them. Given back to
    `encode_messages` as `replay` under the calls' ids, the turn is rendered as it was generated.
    """
    _, body = split_reasoning(text, thinking)
    turn = body.partition(EOS)[0]
    block = find_calls(turn)
    if block is None or not (block.calls and block.is_sound) or turn[block.end :].strip():
        return ""
    before = turn[: block.start]
    content = before[:-2] if before.endswith("\n\n") else before.removesuffix("\n")
    return turn[len(content) :]


def replayed(calls: tuple[Call, ...], replay: Mapping[str, str]) -> list[Segment] | None:
    """The text that exactly these calls were sampled as, or None.

    Their ids must lead to one text, and it must say the same names and, as JSON values, the same
    arguments: calls that a client has edited, or that only share an id with others, have none.
    """
    texts = {replay.get(call.id) for call in calls if call.id} - {None}
    if len(texts) != 1:
        return None
    text = texts.pop() or ""
    block = find_calls(text)
    if block is None or not block.is_sound or (text[: block.start] + text[block.end :]).strip():
        return None
    if len(block.calls) != len(calls) or not all(map(_is_same_call, block.calls, calls)):
        return None
    return divided(text, block.values)


def _is_same_call(one: Call, other: Call) -> bool:
    return one.name == other.name and _is_same(_arguments(one), _arguments(other))


def _arguments(call: Call) -> dict[str, Any]:
    return {parameter.key: value_of(parameter) for parameter in call.parameters}


def _is_same(one: Any, other: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are one number, but none of them is true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
