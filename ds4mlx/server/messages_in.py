"""Messages of chat clients, less what says nothing to the model.

The encoding refuses keys that it would lose; a server meets clients that send keys of their own.
"""

from typing import Any

_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal")
_MESSAGE += ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "prefix")
_CALL, _FUNCTION = ("id", "type", "function"), ("name", "arguments")
_PART = ("type", "text", "refusal", "thinking", "reasoning", "summary", "content", "name", "input")
_PART += ("id", "tool_use_id")


def known_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the keys that are read; what is no object is left for the encoding."""
    return [_message(message) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    kept = _only(message, _MESSAGE)
    if isinstance(kept.get("content"), list):
        kept["content"] = [_only(part, _PART) for part in kept["content"]]
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call) for call in kept["tool_calls"]]
    if isinstance(kept.get("reasoning_details"), list):
        kept["reasoning_details"] = [d for d in kept["reasoning_details"] if not _is_sealed(d)]
    return kept


def _is_sealed(detail: Any) -> bool:
    """Whether it is a part of a thought that only the model can read which had it."""
    return isinstance(detail, dict) and detail.get("type") == "reasoning.encrypted"


def _call(call: Any) -> Any:
    """A call; that of a custom tool as the other protocols tell it."""
    custom = call.get("custom") if isinstance(call, dict) else None
    if isinstance(custom, dict):
        function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
        return {"id": call.get("id"), "type": "function", "function": function}
    kept = _only(call, _CALL)
    if isinstance(kept, dict) and "function" in kept:
        kept["function"] = _only(kept["function"], _FUNCTION)
    return kept


def _only(value: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: inner for key, inner in value.items() if key in keys}
