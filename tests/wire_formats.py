"""Streams of the protocols as their SDKs know them: every event's type, and their order."""

import json

from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

MESSAGES = TypeAdapter(RawMessageStreamEvent)
RESPONSES = TypeAdapter(ResponseStreamEvent)


def sse(lines):
    """The events of a stream's lines, as (name, data); comments are left out."""
    name = None
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield name, json.loads(line.removeprefix("data:"))
        elif not line:
            name = None


def message_of(events):
    """The message that Messages' events make; AssertionError where one is wrong or out of order."""
    events = [event for event in events if event["type"] != "ping"]
    for event in events:
        MESSAGES.validate_python(event)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("message_delta") == 1
    message, blocks, is_open = dict(events[0]["message"]), [], False
    assert message["content"] == [] and message["stop_reason"] is None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append((dict(event["content_block"]), []))
            is_open = True
            continue
        assert is_open and event["index"] == len(blocks) - 1
        if event["type"] == "content_block_stop":
            is_open = False
        else:
            blocks[-1][1].append(event["delta"])
    assert not is_open
    message["content"] = [block for block, deltas in blocks if _fill_block(block, deltas)]
    message |= events[-2]["delta"] | {"usage": events[-2]["usage"]}
    Message.model_validate(message)
    return message


def _fill_block(block, deltas):
    """Puts the deltas into their block; whether it is whole."""
    joined = {}
    for delta in deltas:
        ((key, text),) = ((k, v) for k, v in delta.items() if k != "type")
        assert (
            delta["type"]
            in {
                "text": ("text_delta",),
                "thinking": ("thinking_delta", "signature_delta"),
                "tool_use": ("input_json_delta",),
            }[block["type"]]
        )
        joined[key] = joined.get(key, "") + text
    if block["type"] == "thinking":
        assert deltas[-1]["type"] == "signature_delta" and block["signature"] == ""
    if block["type"] == "tool_use":
        assert block["input"] == {}
        try:
            joined = {"input": json.loads(joined.get("partial_json") or "{}")}
        except ValueError:
            return False
    block |= joined
    return True


def response_of(events):
    """The response that Responses' events make, checked like `message_of`."""
    for number, event in enumerate(events):
        RESPONSES.validate_python(event)
        assert event["sequence_number"] == number
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert all(event["response"]["output"] == [] for event in events[:2])
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    output = []
    rest = [event for event in events[2:-1] if event["type"] != "response.in_progress"]
    while rest:
        item, rest = _item(rest, len(output))
        output.append(item)
    assert output == last["response"]["output"]
    Response.model_validate(last["response"])
    return last["response"]


_NAMES = {
    "reasoning": "reasoning_text",
    "message": "output_text",
    "function_call": "function_call_arguments",
    "custom_tool_call": "custom_tool_call_input",
}


def _item(events, index):
    """The item that the first events tell, and the events behind it."""
    added, *events = events
    assert added["type"] == "response.output_item.added" and added["output_index"] == index
    item = added["item"]
    at = next(i for i, e in enumerate(events) if e["type"] == "response.output_item.done")
    inner, done, rest = events[:at], events[at], events[at + 1 :]
    assert all(e["output_index"] == index and e["item_id"] == item["id"] for e in inner)
    name, kinds = _NAMES[item["type"]], [e["type"] for e in inner]
    if item["type"] in ("reasoning", "message"):
        assert item["content"] == []
        assert kinds[0] == "response.content_part.added"
        assert kinds[-2:] == [f"response.{name}.done", "response.content_part.done"]
        deltas, whole = inner[1:-2], inner[-2]["text"]
        assert done["item"]["content"] == [inner[-1]["part"]]
        assert inner[-1]["part"]["text"] == whole
    else:
        key = "input" if item["type"] == "custom_tool_call" else "arguments"
        assert item[key] == "" and kinds[-1] == f"response.{name}.done"
        deltas, whole = inner[:-1], inner[-1][key]
        assert done["item"][key] == whole
    assert {e["type"] for e in deltas} <= {f"response.{name}.delta"}
    assert "".join(e["delta"] for e in deltas) == whole
    assert done["item"]["id"] == item["id"] and done["output_index"] == index
    return done["item"], rest
