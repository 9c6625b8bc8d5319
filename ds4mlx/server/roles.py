"""Who speaks in a conversation, in the way that the model was trained on.

Clients know two names for those who run them, system and developer, and speak under them in the
middle of a conversation too. To the model there is one system text, before everything else.
"""

from typing import Any

_OPERATORS = ("system", "developer")


def settled(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with one system message at most, the first; what is told later, the user tells.

    A later one as a system message would lose, once it is history, what asks the model to answer.
    """
    first = next(
        (at for at, message in enumerate(messages) if message.get("role") not in _OPERATORS),
        len(messages),
    )
    leading, rest = messages[:first], messages[first:]
    told = [m | {"role": "user"} if m.get("role") in _OPERATORS else m for m in rest]
    if not leading:
        return told
    return [_joined(leading), *told]


def _joined(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if len(messages) == 1:
        return messages[0] | {"role": "system"}
    parts = [part for message in messages for part in _parts(message.get("content"))]
    return {"role": "system", "content": parts}


def _parts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []
