"""A server against whatever comes: it answers as it says it does, and goes on."""

import gc
import http.client
import json
import random
import resource
import socket
from pathlib import Path

import hostile
import pytest
import serving

from ds4mlx.server.openapi import STATUSES
from ds4mlx.server.safety import Limits

CONTEXT = 512  # so that an answer nobody limited is short
LIMITS = Limits(body=1 << 20, stalled_seconds=0.3)
GOOD = {"prompt": "def f(", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def target(embedded):
    """A server with limits that can be reached at once."""
    with serving.serving(*embedded, context=CONTEXT, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(embedded):
    """A server that waits for a second only."""
    limits = Limits(header_seconds=1, body_seconds=1)
    with serving.serving(*embedded, context=CONTEXT, limits=limits) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(request):
    """The next good request works."""
    yield
    for name in {"target", "impatient"} & set(request.fixturenames):
        assert_good(request.getfixturevalue(name))


def assert_good(server):
    status, answer = server.json("POST", "/v1/completions", GOOD)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2
    assert server.json("GET", "/health")[1]["status"] == "ok"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=serving.PATIENCE)


def rest(sock):
    """What still comes until the server closes the connection."""
    received = b""
    try:
        while piece := sock.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


def head(path="/v1/completions", **headers):
    """The beginning of a POST, up to and with the end of its headers."""
    named = {"Host": "localhost", "Content-Type": "application/json"} | headers
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items()]
    return f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def malformed(target, count, seed):
    """Every answer has a status that there is, in the shape of its protocol."""
    description = target.json("GET", "/openapi.json")[1]
    seen = set()
    for path, body in hostile.bodies(description, count, seed):
        status, _, raw = target.ask("POST", path, body)
        assert status in STATUSES and status not in (503, 529), (status, path, body[:500], raw)
        assert status == 200 or (b'"error"' in raw and b"Traceback" not in raw)
        seen.add(status)
    assert seen >= {200, 400}


def test_malformed_bodies(target):
    malformed(target, 90, seed=1)


@pytest.mark.slow
def test_two_thousand_malformed_bodies(embedded):
    """And the memory is what it was after the first of them, but for states that are kept."""
    with serving.serving(*embedded, context=CONTEXT, limits=LIMITS, reuse=False) as server:
        malformed(server, 500, seed=2)
        before = memory()
        malformed(server, 1500, seed=3)
        assert memory() < before + (100 << 20)
        assert_good(server)


def memory():
    """Bytes that the process holds now, where Linux says so; else nothing is compared."""
    gc.collect()
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * resource.getpagesize() if file.exists() else 0


def test_bytes_that_are_no_request(target):
    source = random.Random(1)
    for _ in range(100):
        with connect(target) as sock:
            sock.sendall(hostile.garbage(source))
            sock.shutdown(socket.SHUT_WR)
            answer = rest(sock)
            assert not answer or status_of(answer) in STATUSES, answer


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y\r\n"]
)
def test_headers_that_do_not_come(impatient, begun):
    with connect(impatient) as sock:
        sock.sendall(begun)
        assert status_of(rest(sock)) == 408


def test_a_second_request_that_does_not_come(impatient):
    with connect(impatient) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        answer = rest(sock)
        assert status_of(answer) == 200 and b"HTTP/1.1 408" in answer


@pytest.mark.parametrize("length", [{"Content_Length": 50}, {"Transfer_Encoding": "chunked"}])
def test_a_body_that_does_not_come(impatient, length):
    with connect(impatient) as sock:
        sock.sendall(head(**length) + b"2\r\n{")
        assert status_of(rest(sock)) == 408


def test_a_client_that_closes_its_half(target):
    with connect(target) as sock:
        sock.sendall(head(Content_Length=50) + b"{")
        sock.shutdown(socket.SHUT_WR)
        answer = rest(sock)
        assert not answer or status_of(answer) in STATUSES


def test_a_client_that_leaves_a_stream(target):
    body = b'{"prompt": "x", "stream": true, "temperature": 2, "max_tokens": 400}'
    with connect(target) as sock:
        sock.sendall(head(Content_Length=len(body)) + body)
        assert sock.recv(20)


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_that_are_too_large(target, declared):
    """Most of a body beyond the limit is read, so that its sender hears why it is refused."""
    size = 3 * LIMITS.body
    body = b" " * size if declared else iter([b" " * 65536] * (size // 65536))
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=serving.PATIENCE)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, kind, encode_chunked=not declared)
    answer = connection.getresponse()
    assert answer.status == 413 and answer.getheader("Connection") == "close"
    connection.close()


def test_chunks_without_an_end(target):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connect(target) as sock:
        sock.sendall(head(Transfer_Encoding="chunked"))
        sent = 0
        try:
            while sent < 64 << 20:
                sock.sendall(chunk)
                sent += len(chunk)
        except ConnectionError:
            pass
        assert sent < 64 << 20


def test_a_get_with_a_body_without_an_end(target):
    with connect(target) as sock:
        sock.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer = rest(sock)
        assert status_of(answer) == 200 and b"connection: close" in answer.lower()


def test_a_reader_that_takes_nothing(target):
    """Answers to requests that were sent all at once fill its buffers; then it is left."""
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", target.port))
        own = sock.getsockname()
        sock.setblocking(False)
        try:
            while True:
                sock.send(asked * 100)
        except BlockingIOError:
            pass  # the server reads no more, as nobody reads what it says
        while any(each.client == own for each in target.server.server_state.connections):
            assert target.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/", "/v1/messages"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost@evil", "", "[::1", "1.2.3.4"]
)
def test_other_hosts_are_refused(target, path, host):
    status, answer = target.json("GET", path, Host=host)
    assert status == 403 and "host" in answer["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:9", "localhost."]
)
def test_names_of_this_machine_are_served(target, host):
    assert target.ask("GET", "/health", Host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "http://localhost:1", "vscode://x"]
)
def test_other_origins_are_refused(target, origin):
    for method, path, body in (("GET", "/health", None), ("POST", "/v1/completions", GOOD)):
        status, answer = target.json(method, path, body, Origin=origin)
        assert status == 403 and "origin" in answer["error"]["message"]


def test_the_own_origin_is_served(target):
    assert target.ask("POST", "/v1/completions", GOOD, Origin=target.url)[0] == 200
    assert target.ask("GET", "/health", Sec_Fetch_Mode="cors")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "application/json; charset=utf-16"},
        {"Content_Encoding": "gzip"},
    ],
)
def test_only_plain_json_is_taken(target, headers):
    assert target.ask("POST", "/v1/completions", GOOD, **headers)[0] == 415


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/chat/completions", 405, {"POST"}),
        ("HEAD", "/v1/messages", 405, {"POST"}),
        ("OPTIONS", "/v1/responses", 405, {"POST"}),
        ("DELETE", "/v1/models", 405, {"GET", "HEAD"}),
        ("POST", "/v1/responses/resp_1", 405, {"GET", "HEAD", "DELETE"}),
        ("DELETE", "/", 405, {"GET", "HEAD"}),
        ("GET", "/v1/chat/completions/", 404, None),
        ("GET", "/v1/embeddings", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("DELETE", "/nowhere", 404, None),
        ("OPTIONS", "/v1", 404, None),
        ("POST", "/page.js", 405, {"GET", "HEAD"}),
        ("HEAD", "/", 200, None),
        ("GET", "/../app.py", 404, None),
    ],
)
def test_a_path_says_which_methods_it_has(target, method, path, status, allowed):
    body = b"{}" if method == "POST" else None
    code, headers, raw = target.ask(method, path, body)
    assert code == status
    if allowed:
        assert {name.strip() for name in headers["Allow"].split(",")} == allowed
        assert method == "HEAD" or f"has no {method}" in json.loads(raw)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/chat/completions", ": set the client's base URL to one that ends in /v1"),
        ("/responses/resp_1", ": set the client's base URL to one that ends in /v1"),
        ("/v1/v1/messages", ": leave /v1 out of the client's base URL"),
        ("/v1/v1/nothing", ""),
        ("/v1/health", ""),
        ("/v10/v1/messages", ""),
        ("/nothing", ""),
    ],
)
def test_a_base_url_that_is_nearly_right(target, path, advice):
    """Is put right in the words of the protocol."""
    message = f"there is no {path!r} here{advice}"
    for method, body in (("POST", GOOD), ("GET", None)):
        error = {"message": message, "type": "not_found_error", "param": None, "code": None}
        assert target.json(method, path, body) == (404, {"error": error})
        status, told = target.json(method, path, body, anthropic_version="2023-06-01")
        assert (status, told["type"]) == (404, "error") and told["error"]["message"] == message


def test_half_surrogate_pairs_are_mended(target):
    """Clients cut texts in the middle of a character; their history must stay usable."""
    body = b'{"messages": [{"role": "user", "content": "a\\ud83d"}], "max_tokens": 0}'
    assert target.ask("POST", "/v1/chat/completions", body)[0] == 200


def test_policies_of_every_answer(target):
    for path in ("/health", "/v1/models", "/nowhere"):
        headers = target.ask("GET", path)[1]
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["x-request-id"]


@pytest.fixture(scope="module")
def locked(embedded):
    """A server with a key, another name, and a page elsewhere that may ask it."""
    options = {"key": "sésame", "hosts": ["box.lan"], "origins": ["https://page.example"]}
    with serving.serving(*embedded, **options) as server:
        yield server


def test_the_key(locked):
    assert locked.ask("GET", "/health", x_api_key="sésame".encode())[0] == 200
    bearer = "Bearer sésame".encode()
    assert locked.ask("GET", "/v1/models", Authorization=bearer)[0] == 200
    for wrong in (
        {},
        {"x_api_key": "sesame"},
        {"Authorization": "Basic x"},
        {"x_api_key": b"\xff"},
    ):
        for path in ("/health", "/v1/models", "/metrics", "/v1/nowhere"):
            status, answer = locked.json("GET", path, **wrong)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
    status, answer = locked.json("POST", "/v1/messages", {})
    assert (status, answer["type"]) == (401, "error")


def test_pages_that_are_allowed(locked):
    asked = {"Origin": "https://page.example", "Access_Control_Request_Method": "POST"}
    status, headers, _ = locked.ask("OPTIONS", "/v1/chat/completions", **asked)
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://page.example"
    assert locked.ask("GET", "/health", Host="box.lan:80", x_api_key="sésame".encode())[0] == 200
    assert locked.ask("OPTIONS", "/health", **asked | {"Origin": "https://other.example"})[0] == 403
