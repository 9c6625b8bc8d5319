"""The content of a message: text, or the parts that OpenAI's and Anthropic's clients send."""

from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from ds4mlx.chat import fields
from ds4mlx.chat.markup import Call, parameters_of
from ds4mlx.errors import DataError

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What has no text. The official encoder names its type in its place.
MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url")
MEDIA += ("file", "input_file", "document")
# Keys that say nothing to the model.
_LABELS = ("type", "id", "index", "status", "cache_control", "citations", "annotations", "logprobs")
_LABELS += ("signature",)


@dataclass(frozen=True)
class Block:
    """A piece of a user turn: text, or a tool's result where `call_id` is not None."""

    text: str
    call_id: str | None = None


@dataclass
class Content:
    """What the parts of a message say, each kind in its order."""

    blocks: list[Block] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(block.text for block in self.blocks)


def read_content(content: Any, role: str, where: str, strict: bool) -> Content:
    """The content of a message of this role; None is an empty text.

    strict: refuse what has no text, instead of naming its type in the text.
    Raises DataError for a part of an unknown type, or one that does not belong to the role.
    """
    if not isinstance(content, list):
        return Content([Block(fields.text(content, "content", where))])
    read = Content()
    for part in content:
        _add(read, part, role, where, strict)
    return read


def read_call(name: Any, arguments: Any, call_id: Any, where: str, strict: bool) -> Call:
    """A call; its arguments are an object, JSON text that should be one, or None for no arguments."""
    if arguments is None or isinstance(arguments, dict):
        arguments = fields.as_json(arguments or {}, where)
    elif not isinstance(arguments, str):
        raise DataError(f"{where} needs arguments, as JSON text or as an object")
    elif strict:
        fields.no_repeats(arguments, f"{where}: arguments")
    arguments = fields.text(arguments, "arguments", where)
    call_id = fields.text(call_id, "id", where)
    return Call(fields.text(name, "name", where), parameters_of(arguments), call_id)


def _add(read: Content, part: Any, role: str, where: str, strict: bool) -> None:
    if not isinstance(part, dict):
        raise DataError(f"{where}: a part of the content must be an object, not {short(part)}")
    kind = fields.text(part.get("type"), "type", where)
    inside = f"{where}: a part of type {short(kind)}"
    if kind in MEDIA or kind in _TEXTS:
        read.blocks.append(Block(_part_text(part, kind, where, strict and role != "tool")))
    elif role == "user" and kind == "tool_result":
        _known(part, ("tool_use_id", "content", "is_error"), inside)
        call_id = fields.text(part.get("tool_use_id"), "tool_use_id", where)
        result = read_content(part.get("content"), "tool", where, strict)
        read.blocks.append(Block(result.text, call_id))
    elif role == "assistant" and kind in ("thinking", "reasoning"):
        read.reasoning.append(_thought(part, inside))
    elif role == "assistant" and kind == "tool_use":
        _known(part, ("name", "input", "caller"), inside)
        name = fields.field(part, "name", str, inside)
        read.calls.append(read_call(name, part.get("input"), part.get("id"), inside, strict))
    else:
        raise DataError(f"{inside} cannot be read in the content of a message of the role {role}")


def _part_text(part: dict[str, Any], kind: str, where: str, strict: bool) -> str:
    inside = f"{where}: a part of type {short(kind)}"
    if kind in MEDIA:
        if strict:
            raise DataError(f"{inside} has no text, and the model reads nothing else")
        return f"[Unsupported {kind}]"
    _known(part, (_TEXTS[kind],), inside)
    return fields.text(part.get(_TEXTS[kind]), _TEXTS[kind], where)


def _thought(part: dict[str, Any], where: str) -> str:
    """The text of a thought: under its type, or in the parts of a summary or a content."""
    _known(part, ("thinking", "reasoning", "text", "summary", "content"), where)
    said = [fields.text(part.get(key), key, where) for key in ("thinking", "reasoning", "text")]
    for key in ("summary", "content"):
        inner = fields.items(part.get(key), key, where)
        said += [fields.field(item, "text", str, f"{where}: {key}") for item in inner]
    return "\n\n".join(text for text in said if text)


def _known(part: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    fields.only(part, (*_LABELS, *keys), where)
