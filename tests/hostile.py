"""Requests as nobody should send them, made from the server's own description, repeatable by seed."""

import json
import random

# A value of each type, in the bounds that there usually are.
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "x"},
}
DEEP = "[" * 5000 + "]" * 5000
# Texts of JSON values that have broken servers.
TRAPS = [
    "9" * 5000,
    "-" + "1" * 4400,
    "1e999",
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '"\\u0000"',
    '"<｜User｜>"',
    DEEP,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + ",".join(["{}"] * 2000) + "]",
    '{"$ref": "#"}',
    '{"type": "array", "minItems": 1000000000}',
    '{"type": "string", "pattern": "((a+)+)+$("}',
    '{"type": "string", "pattern": "(x+x+)+y{1000}"}',
    json.dumps({"enum": [f"choice {number}" for number in range(20_000)]}),
    '{"type": "string", "arguments": "{", "name": ""}',
    "[[]]",
    '""',
    "[]",
    "{}",
    "null",
    "true",
    "-1",
    "0.5",
    '"5"',
    "1e308",
    "4294967296",
    '"\\ud83d"',
    '[{"role": [], "content": {}}]',
    '[{"role": "assistant", "content": [], "tool_calls": [{"id": 5, "function": []}]}]',
    '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no"}}]}]',
    '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]',
    '[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]',
    '[{"type": "function", "name": "f", "parameters": {"type": "array", "minItems": 1e9}}]',
    '[{"type": "namespace", "name": "n", "tools": [{"type": "namespace", "tools": []}]}]',
    '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}',
    '{"type": "json_schema", "name": "x", "schema": {"enum": [], "not": {}}}',
    '{"type": "function", "function": {"name": "nobody"}}',
]
# A field whose good values let an answer go on for long gets bad ones only.
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
BAD_LENGTHS = ["-1", "1.5", '"9"', "[]", "{}", "true", "1e999", "9" * 5000, "4294967296"]


def bodies(description, count, seed):
    """`count` pairs of a path and the bytes of a body: good ones with some things wrong."""
    source = random.Random(seed)
    paths = list(description["paths"])
    for _ in range(count):
        path = source.choice(paths)
        yield path, _body(source, path, _fields(description, path))


def _fields(description, path):
    content = description["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return list(description["components"]["schemas"][name]["properties"])


def _body(source, path, fields):
    texts = {key: json.dumps(value) for key, value in GOOD[path].items()}
    texts["model"] = '"x"'
    for field in source.sample(fields, source.choice([0, 1, 1, 1, 2, 3])):
        texts[field] = source.choice(BAD_LENGTHS if field in LENGTHS else TRAPS)
    if source.random() < 0.1:
        texts.pop(source.choice(list(texts)))
    pairs = [f'"{key}": {value}' for key, value in texts.items()]
    pairs += source.sample(pairs, source.random() < 0.05)  # a key twice
    return _spoiled(source, ("{" + ", ".join(pairs) + "}").encode())


def _spoiled(source, body):
    """Mostly the body as it is, else one that is no JSON, or in no UTF-8."""
    kind = source.random()
    if kind < 0.04:
        return body[: source.randrange(len(body))]
    if kind < 0.06:
        return b"\xef\xbb\xbf" + body
    if kind < 0.08:
        return body.decode().encode("utf-16")
    if kind < 0.10:
        return source.randbytes(source.randrange(200))
    if kind < 0.12:
        at = source.randrange(len(body))
        return body[:at] + source.randbytes(3) + body[at:]
    return body


def garbage(source):
    """Bytes that are no HTTP, or nearly some."""
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    return source.choice(
        [
            source.randbytes(source.randrange(1, 400)),
            b"\r\n" * 50 + b"\x00",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + source.randbytes(64),  # TLS
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /%00%ff%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            request + b"Content-Length: -5\r\n\r\n{}",
            request + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
            request + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            request + b"Content-Length: " + b"9" * 300 + b"\r\n\r\n{}",
            request + b"Transfer-Encoding: gzip\r\n\r\n{}",
            request + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
            request + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n{}",
            request + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nTrailer: x\r\n\r\n",
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
            b"POST /v1/completions HTTP/1.0\r\n\r\n",
        ]
    )
