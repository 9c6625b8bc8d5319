"""Who may ask: names of this server, origins of web pages, the key; and how much may be sent.

A web page in a browser of this machine reaches loopback too: by a name that it makes point here, and
by requests that browsers send without asking. So every request's Host and Origin are looked at, and
bodies must be JSON. What a client is refused for here costs no reading of its body.
"""

import hmac
import ipaddress
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4mlx.server.errors import Refusal, dialect_of

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY = "*"
# What a request may hold at most, beside the bytes.
MOST_MESSAGES, MOST_TOOLS, MOST_STOPS, LONGEST_STOP = 10_000, 1_024, 64, 1_024
_POLICY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """What a client may take of the server.

    body: bytes. depth: of JSON. values: brackets and braces that open in a body, as each becomes an
    object many times as large. header_seconds, body_seconds: until the headers, or the body, are
    there. stalled_seconds: how long a reader may take nothing. connections: at a time.
    """

    body: int = 32 << 20
    depth: int = 100
    values: int = 1_000_000
    header_seconds: float = 20
    body_seconds: float = 60
    stalled_seconds: float = 60
    connections: int = 256


@dataclass(frozen=True)
class Doors:
    """Who is let in. hosts: names beside loopback's. origins: of web pages, or `ANY`."""

    key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises Refusal unless the request may come in."""
        host = headers.get("host", "")
        self._check_host(host, scope)
        self._check_origin(headers.get("origin"), host)

    def check_key(self, scope: Scope, headers: Headers) -> None:
        """Raises Refusal for an API request without the key. The page itself is open."""
        if self.key is None or not is_api(scope["path"]):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # A header is bytes, which are read as if they were Latin-1.
        if not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_host(self, host: str, scope: Scope) -> None:
        name = _name(host)
        own = scope.get("server") or ("", 0)
        if name in LOOPBACK or name in map(str.lower, self.hosts) or ANY in self.hosts:
            return
        if name and _is_address(name) and name == own[0]:
            return
        raise Refusal(
            403, f"the host {host[:200]!r} is not a name of this server; --allow-host adds one"
        )

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or ANY in self.origins or origin in self.origins:
            return
        parts = _split(origin)
        if parts is not None and parts.scheme in ("http", "https") and parts.netloc == host.lower():
            return
        raise Refusal(403, f"the origin {origin[:200]!r} is not allowed here; --cors allows one")


class Guard:
    """Middleware: the checks of every request, before anything is read of its body."""

    def __init__(self, app: ASGIApp, doors: Doors):
        self.app, self.doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        dialect = dialect_of(scope["path"], headers)
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        body = _Body(headers, receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                _finish_headers(MutableHeaders(scope=message), dialect.id_header, request_id, body)
            await send(message)

        try:
            self.doors.check(scope, headers)
            _check_body(scope["method"], headers)
        except Refusal as refusal:
            await dialect.response(refusal, request_id)(scope, receive, answer)
            return
        await self.app(scope, body.receive, answer)


class KeyGuard:
    """Middleware: the key. Behind the answers to browsers that ask whether they may send one."""

    def __init__(self, app: ASGIApp, doors: Doors):
        self.app, self.doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self.doors.check_key(scope, headers)
            except Refusal as refusal:
                dialect = dialect_of(scope["path"], headers)
                response = dialect.response(refusal, scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Body:
    """What is known of a request's body: whether all of it was read."""

    def __init__(self, headers: Headers, receive: Receive):
        self._receive = receive
        self.is_read = "transfer-encoding" not in headers and headers.get("content-length") in (
            None,
            "0",
        )

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self.is_read = True
        return message


def is_api(path: str) -> bool:
    """Whether a path is of the interface for programs, and not of the page for people."""
    return path.startswith("/v1/") or path in ("/v1", "/health", "/metrics", "/openapi.json")


def is_loopback(host: str) -> bool:
    """Whether a host to listen on can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _check_body(method: str, headers: Headers) -> None:
    if method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return
    kind, _, parameters = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise Refusal(415, "the Content-Type must be application/json")
    charset = parameters.lower().replace('"', "").partition("charset=")[2].split(";")[0].strip()
    if charset not in ("", "utf-8", "utf8"):
        raise Refusal(415, "the body must be UTF-8")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Refusal(415, "the body must be sent without a Content-Encoding")


def _finish_headers(headers: MutableHeaders, id_header: str, request_id: str, body: _Body) -> None:
    headers[id_header] = request_id
    for name, value in _POLICY.items():
        headers.setdefault(name, value)
    if not body.is_read:  # or what is left of it would be read for as long as it comes
        headers["Connection"] = "close"


def _name(host: str) -> str:
    """The name in a Host header, in lower case, without its port."""
    parts = _split(f"//{host}")
    usual = parts is not None and parts.netloc == host.lower() and "@" not in host
    return (parts.hostname or "").rstrip(".") if parts is not None and usual else ""


def _split(url: str):
    try:
        parts = urlsplit(url.lower())
        _ = parts.port
    except ValueError:
        return None
    return parts


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
