"""Messages as clients send them, checked and turned into `Turn`s.

Owns every check: what comes after trusts a Turn. What is known is read under any of its usual
names; a key that would be lost is refused by name. Reads the given messages, never changes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from ds4mlx.chat import fields
from ds4mlx.chat.content import Block, Content, read_call, read_content
from ds4mlx.chat.markup import Call
from ds4mlx.chat.tokens import TASKS
from ds4mlx.errors import DataError

Message = dict[str, Any]

_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
# Keys that say nothing to the model: names of things, and what servers note beside a message.
_LABELS = ("role", "content", "id", "name", "type", "index", "status", "created", "created_at")
_LABELS += ("timestamp", "metadata", "cache_control", "annotations", "logprobs", "finish_reason")
_LABELS += ("stop_reason", "usage", "model", "mask", "malformed", "task", "wo_eos")
_SECTIONS = ("tools", "response_format")
_KEYS = {
    "system": _SECTIONS,
    "developer": _SECTIONS,
    "latest_reminder": (),
    "user": ("content_blocks",),
    "assistant": (
        *(*_REASONING, "reasoning_details", "tool_calls", "function_call", "refusal", "prefix"),
        *_SECTIONS,
    ),
    "tool": ("tool_call_id", "is_error"),
    "function": (),
}


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


def read_turns(
    messages: Sequence[Message], what: str = "message", strict: bool = False
) -> list[Turn]:
    """One Turn per message.

    strict: refuse also what the official encoder leaves out or only names: pictures and the like,
        tools and response formats of users, keys given twice in arguments.
    Raises DataError, naming the message by `what` and its index, where one has an unknown role,
    a key that is not read, a field of the wrong type, or something that has no JSON.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"the {what}s must be a list, not {type(messages).__name__}")
    return [_turn(message, f"{what} {index}", strict) for index, message in enumerate(messages)]


def read_tools(tools: Any, where: str) -> tuple[str, ...]:
    """The JSON of each tool's `function`, from an OpenAI list of tools or None."""
    places = [
        (tool, f"{where}: tool {index}")
        for index, tool in enumerate(fields.items(tools, "tools", where))
    ]
    return tuple(
        fields.as_json(fields.field(tool, "function", dict, place), place) for tool, place in places
    )


def _turn(message: Any, where: str, strict: bool) -> Turn:
    role = fields.field(message, "role", str, where)
    if role not in _KEYS:
        raise DataError(f"{where} has the unknown role {short(role)}")
    lost = () if strict or role not in ("user", "tool") else _SECTIONS  # as officially
    fields.only(message, (*_LABELS, *_KEYS[role], *lost), where)
    if role in ("tool", "function"):
        return _result(message, where, strict)
    content = message.get("content")
    if role == "user" and content is None:
        content = message.get("content_blocks")
    read = read_content(content, role, where, strict)
    task = _task(message, where)
    if role == "user":
        return Turn(role, blocks=tuple(read.blocks) or (Block(""),), task=task)
    if role == "assistant":
        return _answer(message, read, where, strict)
    if role == "developer" and not read.text:
        raise DataError(f"{where}: a developer message needs content")
    return Turn(role, read.text, task=task, **_sections(message, where))


def _result(message: Message, where: str, strict: bool) -> Turn:
    """A tool's result; one of the older role `function` belongs to the call before it."""
    read = read_content(message.get("content"), "tool", where, strict)
    call_id = fields.text(message.get("tool_call_id"), "tool_call_id", where)
    return Turn("tool", blocks=(Block(read.text, call_id),))


def _answer(message: Message, read: Content, where: str, strict: bool) -> Turn:
    refusal = fields.text(message.get("refusal"), "refusal", where)
    return Turn(
        "assistant",
        "\n\n".join(text for text in (read.text, refusal) if text),
        reasoning=_reasoning(message, read, where),
        calls=_calls(message, read, where, strict),
        task=_task(message, where),
        wo_eos=bool(message.get("wo_eos") or message.get("prefix")),
        **_sections(message, where),
    )


def _sections(message: Message, where: str) -> dict[str, Any]:
    form = message.get("response_format")
    return {
        "tools": read_tools(message.get("tools"), where),
        "response_format": fields.as_json(form, where) if form else "",
    }


def _reasoning(message: Message, read: Content, where: str) -> str:
    """The thought before an answer, under whatever name; two names must say the same."""
    said = {key: fields.text(message.get(key), key, where) for key in _REASONING}
    said["content"] = "\n\n".join(read.reasoning)
    said = {key: text for key, text in said.items() if text}
    if len(set(said.values())) > 1:
        raise DataError(f"{where}: {' and '.join(said)} hold different reasoning")
    details = fields.items(message.get("reasoning_details"), "reasoning_details", where)
    if not said and details:
        place = f"{where}: reasoning_details"
        return "\n\n".join(_detail(detail, place) for detail in details)
    return next(iter(said.values()), "")


def _detail(detail: Any, where: str) -> str:
    key = "summary" if isinstance(detail, dict) and "summary" in detail else "text"
    return fields.text(fields.field(detail, key, str, where), key, where)


def _calls(message: Message, read: Content, where: str, strict: bool) -> tuple[Call, ...]:
    calls = [
        _call(call, f"{where}: tool call {index}", strict)
        for index, call in enumerate(fields.items(message.get("tool_calls"), "tool_calls", where))
    ]
    kinds = {"tool_calls": calls, "tool_use": read.calls, "function_call": []}
    if function := message.get("function_call"):
        inside = f"{where}: function_call"
        name = fields.field(function, "name", str, inside)
        fields.only(function, ("name", "arguments"), inside)
        arguments = function.get("arguments")
        kinds["function_call"] = [read_call(name, arguments, "", inside, strict)]
    used = [kind for kind, given in kinds.items() if given]
    if len(used) > 1:
        raise DataError(f"{where} has calls both as {' and as '.join(used)}")
    return tuple(kinds[used[0]]) if used else ()


def _call(call: Any, where: str, strict: bool) -> Call:
    function = fields.field(call, "function", dict, where)
    name = fields.field(function, "name", str, where)
    fields.only(call, ("id", "type", "index", "function", "status", "cache_control"), where)
    fields.only(function, ("id", "name", "arguments", "strict", "parsed_arguments"), where)
    call_id = call.get("id") or function.get("id")
    return read_call(name, function.get("arguments"), call_id, where, strict)


def _task(message: Message, where: str) -> str | None:
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        raise DataError(
            f"{where} has the unknown task {short(task)}, not one of {', '.join(TASKS)}"
        )
    return task
