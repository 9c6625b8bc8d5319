"""A request in the terms of OpenAI's Responses -> messages, tools and wishes in ours.

Items are smaller than messages: a thought, a text and calls that follow each other are one turn of
the assistant.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ds4mlx.chat import fields
from ds4mlx.errors import DataError
from ds4mlx.server.constraints import Allowed, Choice
from ds4mlx.server.efforts import USUAL, level
from ds4mlx.server.errors import Refusal
from ds4mlx.server.offered import Offered, described, joined
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.schemas_responses import InputTokensRequest
from ds4mlx.server.sealed import unseal

# Calls of tools that have no name of their own: the name, and where the arguments are.
_OWN_CALLS = {
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
}
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_OUTPUTS += ("local_shell_call_output", "shell_call_output", "apply_patch_call_output")


def thinking_of(body: InputTokensRequest) -> str:
    """How hard the model thinks; Refusal for an effort that there is not."""
    return level((body.reasoning and body.reasoning.effort) or USUAL)


def format_of(body: InputTokensRequest) -> Object | bool | None:
    """The schema that the answer must obey; True for any JSON object, None for any text."""
    wanted = body.text and body.text.format
    if not wanted or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return True
    if wanted.schema_ is None:
        raise Refusal(400, "text.format needs a schema", param="text.format.schema")
    return wanted.schema_


def choice_of(body: InputTokensRequest, offered: Offered) -> Choice:
    """How tools are called. A choice of one that OpenAI's servers would carry out says nothing here.

    Raises DataError for one to call that is not there, Refusal for allowed ones that cannot be read.
    """
    wanted = body.tool_choice
    if isinstance(wanted, str):
        if wanted not in ("none", "auto", "required"):
            raise DataError(f"tool_choice must be none, auto or required, not {wanted!r:.80}")
        return wanted
    kind = wanted.get("type") if wanted else None
    if wanted and kind in ("function", "custom"):
        inner = described(wanted)
        return (offered.named(inner.get("name"), inner.get("namespace")),)
    return Allowed.of(wanted) if wanted and kind == "allowed_tools" else "auto"


def tools_of(body: InputTokensRequest, items: Iterable[Object]) -> list[Object]:
    """The tools of a request, and those that its items add on the way."""
    tools = list(body.tools or [])
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            tools += [tool for tool in item["tools"] if isinstance(tool, dict)]
    return tools


def items_of(body: InputTokensRequest, find: Callable[[str], Object | None]) -> list[Object]:
    """The request's own items. find: an item by its id, for those that are only referred to."""
    if body.input is None or isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}] if body.input else []
    return [_resolved(item, index, find) for index, item in enumerate(body.input)]


def messages_of(instructions: str | None, items: Sequence[Object]) -> list[Object]:
    """The messages for `ds4mlx.chat`, with the instructions as the first."""
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(items):
        _add(messages, item, f"input {index}")
    return messages


def _resolved(item: Object, index: int, find: Callable[[str], Object | None]) -> Object:
    if item.get("type") != "item_reference" and item.keys() != {"id"}:
        return item
    found = find(str(item.get("id")))
    if found is None:
        raise DataError(f"input {index}: there is no item {str(item.get('id'))!r:.80}")
    return found


def _add(messages: list[Object], item: Object, where: str) -> None:
    kind = fields.text(item.get("type"), "type", where) or "message"
    if kind == "message" and item.get("role") != "assistant":
        messages.append({"role": item.get("role"), "content": _parts(item.get("content"))})
    elif kind == "message":
        _assistant(messages)["content"] += _listed(_parts(item.get("content")))
    elif kind == "reasoning":
        _assistant(messages)["content"].append({"type": "reasoning", "text": _thought(item)})
    elif kind in _OUTPUTS:
        output = _output(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif (call := _call(item, kind, where)) is not None:
        _assistant(messages)["tool_calls"].append(call)
        if kind == "mcp_call":
            output = _output(item.get("output") or item.get("error"), where)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})


def _assistant(messages: list[Object]) -> Object:
    """The assistant's turn that goes on, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": [], "tool_calls": []})
    return messages[-1]


def _call(item: Object, kind: str, where: str) -> Object | None:
    """The call of an item; None for an item that the model cannot read, such as a search."""
    if kind in _OWN_CALLS:
        name, key = _OWN_CALLS[kind]
        arguments = item.get(key)
    elif kind in ("function_call", "mcp_call"):
        name, arguments = item.get("name"), item.get("arguments")
    elif kind == "custom_tool_call":
        name, arguments = item.get("name"), {"input": item.get("input")}
    else:
        return None
    if not isinstance(name, str):
        raise DataError(f"{where} needs text as its name")
    function = {"name": joined(item.get("namespace"), name), "arguments": arguments}
    return {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}


def _thought(item: Object) -> str:
    """What the item shows of a thought; else what it carries unseen; else its summary."""
    return (
        _joined(item.get("content"))
        or unseal(item.get("encrypted_content"))
        or _joined(item.get("summary"))
    )


def _joined(parts: Any) -> str:
    inner = parts if isinstance(parts, list) else []
    texts = [part.get("text") for part in inner if isinstance(part, dict)]
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def _parts(content: Any) -> Any:
    """Parts with what the model reads of them; what has the wrong type is refused by name later."""
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "refusal":
        return {"type": "refusal", "refusal": part.get("refusal")}
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    return {"type": part.get("type")}


def _listed(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _output(output: Any, where: str) -> Any:
    """What a tool gave: text, parts, or JSON of any other kind."""
    if output is None or isinstance(output, str):
        return output
    is_parts = isinstance(output, list) and all(
        isinstance(part, dict) and str(part.get("type")).startswith("input_") for part in output
    )
    return _parts(output) if is_parts else fields.as_json(output, where)
