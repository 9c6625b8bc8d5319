"""Questions to a server by plain HTTP, in every protocol, from one event loop."""

import asyncio
import json

PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "completions": "/v1/completions",
}


def body_of(protocol, question, most, **more):
    """The body of a greedy question that is answered without a thought, in at most so many tokens."""
    talk = [{"role": "user", "content": question}] if isinstance(question, str) else question
    made = {
        "chat": {"messages": talk, "max_tokens": most, "reasoning_effort": "none"},
        "messages": {"messages": talk, "max_tokens": most},
        "responses": {"input": talk, "max_output_tokens": most, "reasoning": {"effort": "none"}},
        "completions": {"prompt": question, "max_tokens": most},
    }
    return {"model": "any", "temperature": 0} | made[protocol] | more


def schema_of(protocol, schema):
    """The field that has an answer obey a JSON schema."""
    chat = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {
        "chat": {"response_format": chat},
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        "responses": {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}},
    }[protocol]


async def sent(port, method, path, body=None):
    """Send a request; its connection."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    writer.write(f"{head}\r\n".encode() + payload)
    return reader, writer


async def ask(port, method, path, body=None):
    """(status, JSON, or bytes if it is none) of a whole answer."""
    reader, writer = await sent(port, method, path, body)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        raw = await reader.read()
    finally:
        writer.close()
    status = int(head.split()[1])
    return status, json.loads(raw) if b"application/json" in head.lower() else raw


async def events(reader):
    """The data of each event of a stream. Raises AssertionError for an answer that is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], (head, await reader.read())
    while line := await reader.readline():
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield json.loads(line.removeprefix(b"data: "))


async def streamed(port, protocol, body):
    """The text of a streamed answer that has come to its end."""
    reader, writer = await sent(port, "POST", PATHS[protocol], body | {"stream": True})
    try:
        made = [event async for event in events(reader)]
    finally:
        writer.close()
    assert any(is_last(protocol, event) for event in made), made[-2:]
    return "".join(text_in(protocol, event) for event in made)


async def whole(port, protocol, body):
    """The text of a whole answer."""
    status, told = await ask(port, "POST", PATHS[protocol], body)
    assert status == 200, told
    if protocol == "messages":
        return "".join(block["text"] for block in told["content"])
    if protocol == "responses":
        return "".join(part["text"] for item in told["output"] for part in item["content"])
    choice = told["choices"][0]
    return choice["text"] if protocol == "completions" else choice["message"]["content"]


def text_in(protocol, event):
    """The text that an event of a stream adds to the answer."""
    if protocol == "messages":
        return event.get("delta", {}).get("text", "")
    if protocol == "responses":
        return event["delta"] if event["type"] == "response.output_text.delta" else ""
    choices = event["choices"]
    if protocol == "completions":
        return "".join(choice["text"] for choice in choices)
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def is_last(protocol, event):
    """Whether a stream has come to its end with this event, and not to an error."""
    if protocol in ("messages", "responses"):
        return event["type"] in ("message_stop", "response.completed", "response.incomplete")
    return any(choice["finish_reason"] for choice in event.get("choices", ()))
