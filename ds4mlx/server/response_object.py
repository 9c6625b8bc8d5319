"""What a response says of its request, and the items that it was made from, as clients list them."""

import time
from collections.abc import Mapping

from ds4mlx.server.errors import Refusal
from ds4mlx.server.kept_responses import Kept
from ds4mlx.server.schemas_openai import Object
from ds4mlx.server.schemas_responses import ResponsesRequest

_PLAIN = {"format": {"type": "text"}}


def response_of(response_id: str, body: ResponsesRequest, name: str) -> Object:
    """A response without its output and its end. name: of the model, if the request has none."""
    sampling = {"temperature": body.temperature, "top_p": body.top_p}
    told = {key: 1.0 if value is None else value for key, value in sampling.items()}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or name,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _given(body.reasoning) or {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        **told,
        "text": _given(body.text) or _PLAIN,
        "tool_choice": body.tool_choice or "auto",
        "tools": [_whole_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "user": body.user,
    }


def listed_items(kept: Kept, query: Mapping[str, str]) -> Object:
    """A page of the items. query: order, limit and after, as clients send them."""
    items = [_listed(item, at) for at, item in enumerate(kept.before)]
    if query.get("order") != "asc":
        items.reverse()
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= 100):
        raise Refusal(400, "limit must be a whole number from 1 to 100", param="limit")
    if after := query.get("after"):
        ids = [item["id"] for item in items]
        items = items[ids.index(after) + 1 :] if after in ids else []
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return {"object": "list", "data": page, "has_more": len(page) < len(items), **ends}


def _given(part: object) -> Object | None:
    """A part of the request as it came."""
    dump = getattr(part, "model_dump", None)
    return dump(by_alias=True, exclude_unset=True) if dump else None


def _whole_tool(tool: Object) -> Object:
    """A tool as a response lists it: with keys that a request may leave out."""
    if tool.get("type") == "function":
        return {"parameters": None, "strict": None} | tool
    return tool


def _listed(item: Object, at: int) -> Object:
    """An item with the id and the type that a request may leave out."""
    kind = item.get("type", "message")
    named = {"id": f"{kind}_{at}", "status": "completed"} | item | {"type": kind}
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        extra = {"annotations": []} if part == "output_text" else {}
        named["content"] = [{"type": part, "text": content, **extra}]
    return named
