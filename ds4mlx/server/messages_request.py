"""A request in Anthropic's terms -> messages, tools and wishes in ours.

The same conversation must become the same prompt however a client spells it this time: a text may
be a string or a block, `cache_control` moves, a header line changes with every session.
"""

import re
from typing import Any

from ds4mlx.chat.content import MEDIA
from ds4mlx.server.constraints import Choice
from ds4mlx.server.efforts import USUAL, level
from ds4mlx.server.offered import Offered
from ds4mlx.server.schemas_messages import CountRequest
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.sealed import unseal

# Claude Code's first system block says which build of it asks, and for what.
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_CALLS = ("tool_use", "server_tool_use")


def thinking_of(body: CountRequest) -> tuple[str, int | None]:
    """How hard the model thinks, and for how many tokens at most; without the field, not at all."""
    if body.thinking is None or body.thinking.type == "disabled" or is_continued(body):
        return "none", None
    effort = (body.output_config and body.output_config.effort) or USUAL
    budget = body.thinking.budget_tokens if body.thinking.type == "enabled" else None
    return level(effort), budget


def is_continued(body: CountRequest) -> bool:
    """Whether the last message is the beginning of the answer."""
    last = body.messages[-1] if body.messages else {}
    content = last.get("content")
    blocks = content if isinstance(content, list) else []
    calls = any(isinstance(block, dict) and block.get("type") in _CALLS for block in blocks)
    return last.get("role") == "assistant" and not calls


def schema_of(body: CountRequest) -> Object | None:
    """The JSON schema that the answer must obey, if there is one."""
    wanted = (body.output_config and body.output_config.format) or body.output_format
    return wanted.schema_ if wanted else None


def choice_of(body: CountRequest, offered: Offered) -> Choice:
    """How tools are called. Raises DataError for the name of a tool that is not there."""
    wanted = body.tool_choice
    if wanted is not None and wanted.type == "tool":
        return (offered.named(wanted.name),)
    kind = wanted.type if wanted else "auto"
    return "required" if kind == "any" else kind


def messages_of(body: CountRequest) -> list[Object]:
    """The messages for `ds4mlx.chat`, with the system text as the first."""
    system = _system(body.system)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_message(message) for message in body.messages]
    if is_continued(body):
        messages[-1] |= {"prefix": True}
    return messages


def _system(system: str | list[Object] | None) -> Any:
    if isinstance(system, str):
        return _BILLING.sub("", system)
    blocks = []
    for block in _blocks(system or []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            block = block | {"text": _BILLING.sub("", block["text"])}
            if not block["text"]:
                continue
        blocks.append(block)
    return blocks


def _message(message: Object) -> Object:
    content = message.get("content")
    if isinstance(content, list):
        content = _blocks(content)
        if message.get("role") == "assistant":
            content = [block for block in content if block != {"type": "text", "text": ""}]
    return {"role": message.get("role"), "content": content}


def _blocks(blocks: Any) -> Any:
    if not isinstance(blocks, list):
        return blocks
    return [new for block in blocks if (new := _block(block)) is not None]


def _block(block: Any) -> Any:
    """A block with what the model reads of it; None if that is nothing.

    What has the wrong type stays, and is refused by name later.
    """
    if not isinstance(block, dict):
        return block
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": block.get("text")}
    if kind in _CALLS:
        return {"type": "tool_use", **{key: block.get(key) for key in ("id", "name", "input")}}
    if kind == "tool_result":
        result = {"tool_use_id": block.get("tool_use_id"), "content": _blocks(block.get("content"))}
        return {"type": "tool_result", **result}
    if kind == "thinking":
        return {
            "type": "thinking",
            "thinking": block.get("thinking") or unseal(block.get("signature")),
        }
    if kind == "redacted_thinking":
        return None
    return _other(block, kind)


def _other(block: Object, kind: Any) -> Object:
    """A block that is no talk: as text where it holds some, else it is named."""
    if kind == "document" and (text := _document(block.get("source"))) is not None:
        return {"type": "text", "text": "\n".join([*_titles(block, "title", "context"), text])}
    if kind == "search_result":
        texts = _texts(block.get("content"))
        return {"type": "text", "text": "\n".join([*_titles(block, "title", "source"), *texts])}
    if kind == "tool_reference":
        return {"type": "text", "text": "\n".join(_titles(block, "tool_name"))}
    if kind in MEDIA or not isinstance(kind, str):
        return {"type": kind}
    return {"type": "text", "text": f"[Unsupported {kind}]"}


def _document(source: Any) -> str | None:
    if not isinstance(source, dict):
        return None
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return source["data"]
    if source.get("type") == "content":
        content = source.get("content")
        return content if isinstance(content, str) else "\n".join(_texts(content))
    return None


def _texts(blocks: Any) -> list[str]:
    inner = blocks if isinstance(blocks, list) else []
    return [text for b in inner if isinstance(b, dict) and isinstance(text := b.get("text"), str)]


def _titles(block: Object, *keys: str) -> list[str]:
    return [text for key in keys if isinstance(text := block.get(key), str) and text]
