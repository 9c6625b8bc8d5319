"""Clients that stream chat completions at the same time from one server, and write down when tokens come.

    python benchmarks/serve_clients.py     reads {port, bodies} as JSON from standard input

Prints a JSON list, an entry a body: when it was sent, when each event with text came, both in seconds
of this process's clock, and the usage that the answer told. Stands on Python's own library alone.
"""

import asyncio
import json
import sys
import time


async def answer(port: int, body: dict) -> dict:
    """One streamed answer. Raises RuntimeError for one that is none."""
    payload = json.dumps(
        body | {"stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    sent = time.perf_counter()
    writer.write(head.encode() + payload)
    times, usage, done = [], None, False
    while line := await reader.readline():
        if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
            raise RuntimeError(f"{line!r}: {await reader.read(2000)!r}")
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            break
        event = json.loads(line[len(b"data: ") :])
        usage = event.get("usage") or usage
        if any(choice["delta"].get("content") for choice in event.get("choices", ())):
            times.append(time.perf_counter())
    writer.close()
    if not done or usage is None or not times:
        raise RuntimeError(f"an answer ended after {len(times)} events: {usage}")
    return {"sent": sent, "times": times, "usage": usage}


async def all_at_once(port: int, bodies: list[dict]) -> list[dict]:
    """An answer to each body, all asked for at the same time."""
    return await asyncio.gather(*(answer(port, body) for body in bodies))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump(asyncio.run(all_at_once(asked["port"], asked["bodies"])), sys.stdout)
