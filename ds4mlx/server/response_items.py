"""An item of a response's output while it grows, and as clients see it."""

import secrets
from dataclasses import dataclass, field

from ds4mlx.server.offered import Tool
from ds4mlx.server.partial_json import InputReader
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.sealed import seal

# What the events of an item's text are called, by the item's type.
TEXTS = {"reasoning": "reasoning_text", "message": "output_text"}
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}


@dataclass
class Item:
    """A thought, a text or a call. fields: of a call. input: reads the text of a custom tool's."""

    kind: str
    fields: Object = field(default_factory=dict)
    text: str = ""
    logprobs: list[Object] = field(default_factory=list)
    input: InputReader | None = None
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{secrets.token_hex(16)}"

    @property
    def is_call(self) -> bool:
        return self.kind not in TEXTS

    @property
    def part(self) -> Object:
        """The one part of a thought or a text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        part = {"type": "output_text", "text": self.text, "annotations": []}
        return part | {"logprobs": list(self.logprobs)}

    def seen(self, status: str, seals: bool = False, is_empty: bool = False) -> Object:
        """The item as it is now. seals: with a thought in the form that `unseal` reads; is_empty:
        before its first part."""
        seen = {"type": self.kind, "id": self.id, **self.fields, "status": status}
        content = [] if is_empty else [self.part]
        if self.kind == "reasoning":
            sealed = {"encrypted_content": seal(self.text)} if seals else {}
            return seen | {"summary": [], "content": content, **sealed}
        if self.kind == "message":
            return seen | {"role": "assistant", "content": content}
        if self.input is not None:
            return seen | {"input": self.input.text}
        return seen | {"arguments": self.text}


def call_item(tool: Tool, call_id: str) -> Item:
    """The item of a call, which names the tool as its client does."""
    fields = {"call_id": call_id, "name": tool.name}
    if tool.namespace is not None:
        fields["namespace"] = tool.namespace
    if tool.is_custom:
        return Item("custom_tool_call", fields, input=InputReader())
    return Item("function_call", fields)
