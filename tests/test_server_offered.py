"""The tools that a request offers, in every protocol, and what its choice of them allows."""

import pytest

from ds4mlx.errors import DataError
from ds4mlx.server import messages_request, responses_request
from ds4mlx.server.constraints import Allowed, rule_of
from ds4mlx.server.errors import Refusal
from ds4mlx.server.offered import Tool, of_chat, of_messages, of_responses
from ds4mlx.server.questions import question_of
from ds4mlx.server.schemas_messages import CountRequest
from ds4mlx.server.schemas_openai import ChatRequest
from ds4mlx.server.schemas_responses import InputTokensRequest


def test_tools_of_every_type_are_taken():
    function = {"type": "function", "name": "f", "parameters": {"b": 1, "a": 2}, "strict": True}
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    inner = [{"type": "function", "name": "find"}, {"type": "custom", "name": "patch"}]
    tools = [
        function,
        {"type": "custom", "name": "sql", "description": "Asks.", "format": grammar},
        {"type": "namespace", "name": "mcp__", "description": "", "tools": inner},
        {"type": "namespace", "name": "docs", "tools": [inner[0]]},
        *({"type": kind} for kind in ("web_search", "mcp", "local_shell", "unheard_of")),
    ]
    offered = of_responses(tools)
    names = [tool["function"]["name"] for tool in offered.functions]
    assert names == ["f", "sql", "mcp__find", "mcp__patch", "docs__find"]
    assert list(offered.functions[0]["function"]["parameters"]) == ["b", "a"]
    assert "start: /x/" in offered.functions[1]["function"]["description"]
    assert offered.find("mcp__patch") == Tool("patch", "mcp__", True)
    assert offered.find("docs__find") == Tool("find", "docs")
    assert offered.find("made_up") == Tool("made_up")
    nested = [{"type": "custom", "custom": {"name": "sql", "description": "Asks."}}]
    nested[0]["custom"]["format"] = {"type": "grammar", "grammar": grammar}
    for custom in (of_chat(nested), of_responses(nested), of_chat(tools[1:2])):
        assert custom.find("sql") == Tool("sql", None, True)
        assert custom.functions == [offered.functions[1]]


def test_tools_of_anthropic_s_own_kinds_are_taken():
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "custom", "name": "f", "input_schema": {}},
        {"type": "custom", "name": "g", "input_schema": {"type": "object"}},
    ]
    offered = of_messages(tools)
    assert list(offered.tools) == ["bash", "str_replace_based_edit_tool", "f", "g"]


def test_tools_without_a_name_are_refused():
    for tool in ({"type": "custom", "input_schema": {}}, {"name": 3}):
        with pytest.raises(DataError, match="tool 0 needs text as its name"):
            of_messages([tool])
    for tool in ({"type": "function"}, {"type": "namespace"}, {"type": "custom", "name": []}):
        with pytest.raises(DataError, match="needs text as its name"):
            of_responses([tool])


def test_which_tool_is_to_be_called():
    tools = [{"type": "function", "name": "f"}]
    tools.append({"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "g"}]})
    offered = of_responses(tools)

    def choice(wanted):
        read = InputTokensRequest.model_validate({"tool_choice": wanted})
        return responses_request.choice_of(read, offered)

    assert [choice(mode) for mode in (None, "auto", "none", "required")] == [
        "auto",
        "auto",
        "none",
        "required",
    ]
    assert choice({"type": "function", "name": "f"}) == ("f",)
    assert choice({"type": "custom", "name": "g", "namespace": "n"}) == ("n__g",)
    some = [{"type": "function", "name": "f"}, {"type": "mcp"}, {"name": "g", "namespace": "n"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": some}
    assert choice(allowed) == Allowed(frozenset({"f", "n__g"}), "required")
    assert choice({"type": "web_search_preview"}) == "auto"
    unreadable = [allowed | {"mode": "any"}, allowed | {"tools": None}, {"type": "allowed_tools"}]
    unreadable += ["any", {"type": "function", "name": "h"}, {"type": "function", "name": 3}]
    for wanted in unreadable:
        with pytest.raises((DataError, Refusal), match="tool_choice"):
            choice(wanted)
    messages = {"messages": [{"role": "user", "content": "?"}]}
    for kind, expected in (("any", "required"), ("none", "none"), ("tool", ("f",))):
        wanted = {"type": kind} | ({"name": "f"} if kind == "tool" else {})
        read = CountRequest.model_validate({**messages, "tool_choice": wanted})
        assert messages_request.choice_of(read, offered) == expected


@pytest.mark.parametrize("kind", ["function", "custom"])
def test_a_choice_names_a_tool_as_either_of_two_protocols_does(kind):
    names = [{"type": kind, "name": "f"}, {"type": kind, kind: {"name": "f"}}]
    tools = [{"type": kind, kind: {"name": name}} for name in "fgh"]

    def by_chat(choice):
        messages = [{"role": "user", "content": "?"}]
        asked = {"messages": messages, "tools": tools, "tool_choice": choice}
        return question_of(ChatRequest.model_validate(asked), of_chat(tools)).rule

    def by_responses(choice):
        offered = of_responses(tools)
        read = InputTokensRequest.model_validate({"tool_choice": choice})
        chosen = responses_request.choice_of(read, offered)
        return rule_of(offered.functions, chosen, None, None)

    one, other = map(by_chat, names)
    assert one == other == by_responses(names[0]) == by_responses(names[1])
    assert one is not None and '\\"f\\"' in one.grammar and '\\"g\\"' not in one.grammar
    for mode in ("auto", "required"):
        lists = [{"mode": mode, "tools": [name, {"type": kind, "name": "g"}]} for name in names]
        one, other = (by_chat({"type": "allowed_tools", "allowed_tools": said}) for said in lists)
        assert one == other is not None
        assert [by_responses({"type": "allowed_tools", **said}) for said in lists] == [one, other]
        assert '\\"g\\"' in one.grammar and '\\"h\\"' not in one.grammar
