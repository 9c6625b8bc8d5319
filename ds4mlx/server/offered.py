"""The tools of a request, in every dialect: what the model is offered, and whose call came back.

The model knows only functions with names. A function inside a namespace is offered under a joined
name, a custom tool as a function with one text; `Offered` leads from a call back to the tool.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ds4mlx.chat import fields
from ds4mlx.errors import DataError
from ds4mlx.server.schemas_openai import Object

_COMMAND = {"type": "object", "properties": {"command": {"type": "string"}}}
# Tools that Anthropic's models know without a schema, and clients carry out.
_KNOWN = {
    "bash": {**_COMMAND, "required": ["command"]},
    "text_editor": {
        "type": "object",
        "properties": {
            "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
            "path": {"type": "string"},
            "file_text": {"type": "string"},
            "old_str": {"type": "string"},
            "new_str": {"type": "string"},
            "insert_line": {"type": "integer"},
            "insert_text": {"type": "string"},
            "view_range": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["command", "path"],
    },
}
_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Tool:
    """A tool as its client knows it."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass
class Offered:
    """functions: OpenAI tools for the prompt. tools: by the name in the prompt."""

    functions: list[Object] = field(default_factory=list)
    tools: dict[str, Tool] = field(default_factory=dict)

    def add(self, tool: Tool, description: Any, parameters: Any) -> None:
        """Offers a tool; of two with one name the first."""
        name = joined(tool.namespace, tool.name)
        if name in self.tools:
            return
        self.tools[name] = tool
        function = {"name": name, "description": description, "parameters": parameters}
        kept = {key: value for key, value in function.items() if value is not None}
        self.functions.append({"type": "function", "function": kept})

    def find(self, name: str) -> Tool:
        """The tool of a call; a name that was not offered stands for itself."""
        return self.tools.get(name) or Tool(name)

    def named(self, name: Any, namespace: Any = None) -> str:
        """The name in the prompt of a tool that a client asks for; DataError if it has none."""
        wanted = joined(namespace, name) if isinstance(name, str) else ""
        if wanted not in self.tools:
            raise DataError(f"tool_choice: there is no tool {name!r:.80}")
        return wanted


def joined(namespace: Any, name: str) -> str:
    """The one name under which the model sees a tool."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


def of_messages(tools: Iterable[Object]) -> Offered:
    """Anthropic's tools. Those that Anthropic's own servers carry out are left out."""
    offered = Offered()
    for index, tool in enumerate(tools):
        name = fields.field(tool, "name", str, f"tool {index}") if _is_named(tool) else ""
        schema = tool.get("input_schema", _KNOWN.get(_family(tool)))
        if name and schema is not None:
            offered.add(Tool(name), tool.get("description"), schema)
    return offered


def of_responses(tools: Iterable[Object]) -> Offered:
    """The tools of Responses. Those that OpenAI's own servers carry out are left out."""
    offered = Offered()
    for index, tool in enumerate(tools):
        if tool.get("type") == "namespace":
            place = f"tool {index}"
            namespace = fields.field(tool, "name", str, place)
            for inner in fields.items(tool.get("tools"), "tools", place):
                _add_response(offered, inner, f"{place}: a tool of {namespace:.80}", namespace)
        else:
            _add_response(offered, tool, f"tool {index}", None)
    return offered


def _add_response(offered: Offered, tool: Any, where: str, namespace: str | None) -> None:
    if not isinstance(tool, dict) or tool.get("type") not in ("function", "custom"):
        return
    # Chat's clients nest what Responses has at the top.
    inner: Object = tool["function"] if isinstance(tool.get("function"), dict) else tool
    name = fields.field(inner, "name", str, where)
    if tool["type"] == "custom":
        offered.add(Tool(name, namespace, True), _custom_text(inner), _INPUT)
    else:
        offered.add(Tool(name, namespace), inner.get("description"), inner.get("parameters"))


def _custom_text(tool: Object) -> str | None:
    """The description of a custom tool, with the grammar that its text should follow."""
    form = tool.get("format")
    definition = form.get("definition") if isinstance(form, dict) else None
    parts = [
        tool.get("description"),
        definition and f"The input follows this grammar:\n{definition}",
    ]
    return "\n\n".join(str(part) for part in parts if part) or None


def _family(tool: Object) -> str:
    """The type of a tool of Anthropic's without its date."""
    return str(tool.get("type") or "").rstrip("0123456789").rstrip("_")


def _is_named(tool: Object) -> bool:
    """Tools of Anthropic's own kinds may lack a name; for a client's own it is a mistake."""
    return tool.get("type") in (None, "custom") or "name" in tool
