"""The tools of a request, in every dialect: what the model is offered, and whose call came back.

The model knows only functions with names. A function inside a namespace is offered under a joined
name, a custom tool as a function with one text; `Offered` leads from a call back to the tool.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ds4mlx.chat import fields
from ds4mlx.errors import DataError
from ds4mlx.server.errors import Refusal
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
        function = {"name": name, "description": description, "parameters": parameters}
        self.take(tool, {key: value for key, value in function.items() if value is not None})

    def take(self, tool: Tool, function: Object) -> None:
        """Offers a tool as this function, whose name leads to it."""
        if function["name"] not in self.tools:
            self.tools[function["name"]] = tool
            self.functions.append({"type": "function", "function": function})

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


def described(tool: Object) -> Object:
    """What says a tool's name: the object under its type, as chat has it, or the tool itself."""
    kind = tool.get("type", "function")
    inner = tool.get(kind) if isinstance(kind, str) else None
    return inner if isinstance(inner, dict) else tool


def name_of(tool: Any) -> str | None:
    """The name in the prompt of a tool that a choice speaks of; None where it says none."""
    inner = described(tool) if isinstance(tool, dict) else {}
    name = inner.get("name")
    return joined(inner.get("namespace"), name) if isinstance(name, str) else None


def of_chat(tools: Iterable[Object]) -> Offered:
    """The tools of chat. Those of other types than function and custom are passed over.

    Raises Refusal for a tool without a name, or two of one name.
    """
    offered = Offered()
    for at, tool in enumerate(tools):
        kind = tool.get("type", "function")
        if kind not in ("function", "custom"):
            continue
        inner = _of_chat(tool, kind, f"tools.{at}")
        if inner["name"] in offered.tools:
            message = f"two tools have the name {inner['name'][:80]!r}"
            raise Refusal(400, message, param="tools")
        if kind == "custom":
            offered.add(Tool(inner["name"], is_custom=True), _custom_text(inner), _INPUT)
        else:
            kept = {key: value for key, value in inner.items() if key != "cache_control"}
            offered.take(Tool(inner["name"]), kept)
    return offered


def _of_chat(tool: Object, kind: str, where: str) -> Object:
    """What a tool of chat says under its kind, with a name; a custom one may say it at the top."""
    inner = tool.get(kind, tool if kind == "custom" else None)
    if not isinstance(inner, dict):
        raise Refusal(400, f"{where} needs a {kind}, an object", param=where)
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise Refusal(400, f"{where}.{kind} needs a name", param=where)
    if not isinstance(inner.get("parameters", {}), dict | None):
        raise Refusal(400, f"{where}.{kind}.parameters must be an object", param=where)
    return inner


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
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in ("function", "custom"):
        return
    inner = described(tool)
    name = fields.field(inner, "name", str, where)
    if kind == "custom":
        offered.add(Tool(name, namespace, True), _custom_text(inner), _INPUT)
    else:
        offered.add(Tool(name, namespace), inner.get("description"), inner.get("parameters"))


def _custom_text(tool: Object) -> str | None:
    """The description of a custom tool, with the grammar that its text should follow."""
    form = tool.get("format")
    grammar = form.get("grammar", form) if isinstance(form, dict) else None
    definition = grammar.get("definition") if isinstance(grammar, dict) else None
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
