"""Messages as clients send them, checked and turned into `Turn`s.

Owns every check: what comes after trusts a Turn. Reads the given messages, never changes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from ds4mlx.chat.markup import Call, parameters_of, to_json
from ds4mlx.chat.tokens import TASKS
from ds4mlx.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A piece of a user turn: text, or a tool's result where `call_id` is not None."""

    text: str
    call_id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message. `tools` and `response_format` are JSON; only users and tools have `blocks`."""

    role: str
    text: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[str, ...] = ()
    response_format: str = ""
    task: str | None = None
    wo_eos: bool = False


def read_turns(messages: Sequence[Message], what: str = "message") -> list[Turn]:
    """One Turn per message.

    Raises DataError, naming the message by `what` and its index, where one has an unknown role,
    a field of the wrong type, or something that has no JSON.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"the {what}s must be a list, not {type(messages).__name__}")
    return [_turn(message, f"{what} {index}") for index, message in enumerate(messages)]


def read_tools(tools: Any, where: str) -> tuple[str, ...]:
    """The JSON of each tool's `function`, from an OpenAI list of tools or None."""
    return tuple(
        _json(_field(tool, "function", dict, f"{where}: tool {index}"), f"{where}: tool {index}")
        for index, tool in enumerate(_list(tools, "tools", where))
    )


def _turn(message: Any, where: str) -> Turn:
    role = _field(message, "role", str, where)
    content = message.get("content")
    if role == "tool":
        call_id = _text(message.get("tool_call_id"), "tool_call_id", where)
        return Turn(role, blocks=(Block(_joined(content, where), call_id),))
    if role == "user":
        return Turn(role, blocks=_user_blocks(message, where), task=_task(message, where))
    if role not in ("system", "developer", "assistant", "latest_reminder"):
        raise DataError(f"{where} has the unknown role {short(role)}")
    text = _joined(content, where)
    if role == "developer" and not text:
        raise DataError(f"{where}: a developer message needs content")
    form = message.get("response_format")
    return Turn(
        role,
        text,
        reasoning=_text(message.get("reasoning_content"), "reasoning_content", where),
        calls=_calls(message, where),
        tools=read_tools(message.get("tools"), where),
        response_format=_json(form, where) if form else "",
        task=_task(message, where),
        wo_eos=bool(message.get("wo_eos")),
    )


def _user_blocks(message: Message, where: str) -> tuple[Block, ...]:
    content = message.get("content")
    if content is None:
        content = message.get("content_blocks")
    if not isinstance(content, list):
        return (Block(_text(content, "content", where)),)
    return tuple(_block(part, where) for part in content) or (Block(""),)


def _block(part: Any, where: str) -> Block:
    if isinstance(part, dict) and part.get("type") == "tool_result":
        call_id = _text(part.get("tool_use_id"), "tool_use_id", where)
        return Block(_joined(part.get("content"), where), call_id)
    return Block(_part(part, where))


def _joined(content: Any, where: str) -> str:
    if isinstance(content, list):
        return "\n\n".join(_part(part, where) for part in content)
    return _text(content, "content", where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise DataError(f"{where}: a part of the content must be an object, not {short(part)}")
    if part.get("type") == "text":
        return _text(part.get("text"), "text", where)
    return f"[Unsupported {_text(part.get('type'), 'type', where) or None}]"


def _calls(message: Message, where: str) -> tuple[Call, ...]:
    calls = _list(message.get("tool_calls"), "tool_calls", where)
    return tuple(_call(call, f"{where}: tool call {index}") for index, call in enumerate(calls))


def _call(call: Any, where: str) -> Call:
    function = _field(call, "function", dict, where)
    name = _text(_field(function, "name", str, where), "name", where)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = _json(arguments, where)
    elif not isinstance(arguments, str):
        raise DataError(f"{where} needs arguments, as JSON text or as an object")
    call_id = call.get("id") or function.get("id")
    arguments = _text(arguments, "arguments", where)
    return Call(name, parameters_of(arguments), _text(call_id, "id", where))


def _task(message: Message, where: str) -> str | None:
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        raise DataError(
            f"{where} has the unknown task {short(task)}, not one of {', '.join(TASKS)}"
        )
    return task


def _field(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object, not {short(value)}")
    if not isinstance(value.get(key), kind):
        noun = "text" if kind is str else "an object"
        raise DataError(f"{where} needs {noun} as its {key}, not {short(value.get(key))}")
    return value[key]


def _list(value: Any, key: str, where: str) -> list[Any]:
    if value is not None and not isinstance(value, list | tuple):
        raise DataError(f"{where}: {key} must be a list, not {short(value)}")
    return list(value or ())


def _text(value: Any, key: str, where: str) -> str:
    """The text, "" for None; half a surrogate pair could not be tokenised later."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key} must be text, not {short(value)}")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key} is not Unicode text: {error.reason}") from error
    return value or ""


def _json(value: Any, where: str) -> str:
    try:
        return to_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} holds what JSON cannot: {error}") from error
