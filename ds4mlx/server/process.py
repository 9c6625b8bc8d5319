"""The server as a process: from listening to a signal, and from there to an orderly end.

The first SIGTERM or Ctrl-C, or a terminal that is closed, lets the streams end with their protocol's
error and has the states saved; a second SIGTERM or Ctrl-C ends the process at once.
"""

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette

from ds4mlx.errors import DataError
from ds4mlx.server.app import CLOSING
from ds4mlx.server.connection import protocol_of
from ds4mlx.server.safety import Limits
from ds4mlx.server.service import Service

LOG = logging.getLogger("ds4mlx")
INTERRUPTED = 130
# Seconds that an idle connection is kept, and that the last bytes have after everything is saved.
_IDLE, _LAST_BYTES = 75, 3
_OPEN_FILES = 4096


class Server(uvicorn.Server):
    """uvicorn's, but that everything is ended before it stops listening, and that it says when it listens."""

    def __init__(self, config: uvicorn.Config, service: Service, on_listening: Callable[[], None]):
        super().__init__(config)
        self._service, self._on_listening = service, on_listening
        self.ended_by: int | None = None  # a signal that somebody sent on purpose

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.close(CLOSING)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        if sig == signal.SIGHUP:  # a closed terminal sends several, which are no haste
            return
        if self.ended_by is not None:
            os._exit(INTERRUPTED)
        self.ended_by = sig


def config_of(app: Starlette, limits: Limits) -> uvicorn.Config:
    """How uvicorn is to run an application here."""
    # The scheduler ends the streams; nobody else is to cut them when a signal comes.
    AppStatus.disable_automatic_graceful_drain()
    return uvicorn.Config(
        app,
        http=protocol_of(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LAST_BYTES,
    )


def addresses(host: str, port: int) -> list[Any]:
    """What a host and a port are as `socket.getaddrinfo` gives it; DataError for no such host."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        cause = getattr(error, "strerror", None) or "it cannot be a name"
        said = f"the name {host!r} cannot be resolved ({cause})"
        raise DataError(f"cannot listen on {host}:{port}: {said}") from None


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet. port: 0 for any that is free.

    Raises DataError where there is no such address or it is taken.
    """
    family, kind, protocol, _, address = addresses(host, port)[0]
    try:
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise DataError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return opened


def url_of(opened: socket.socket) -> str:
    """Where a socket is to be reached."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Starlette, opened: socket.socket, limits: Limits) -> int:
    """Serve until a signal; the exit code: 0 after SIGTERM or SIGHUP, 130 after Ctrl-C."""
    _allow_open_files()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    def announce() -> None:
        print(f"listening on {url_of(opened)}", flush=True)

    server = Server(config_of(app, limits), app.state.service, announce)
    _end_at_hangup(server)
    server.run(sockets=[opened])
    code = INTERRUPTED if server.ended_by == signal.SIGINT else 0
    if not app.state.service.scheduler.closed:  # what it still uses must not be taken from it
        LOG.warning("what was read last is not saved, as the time was up")
        _leave_at_once(code)
    return code


def _end_at_hangup(server: Server) -> None:
    """Have a closed terminal end the server, which uvicorn does not; not under nohup.

    It stays so after the server, as more may come while the store is closed.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)


def _leave_at_once(code: int) -> None:
    """End the process although a thread still works."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _allow_open_files() -> None:
    """As many files as connections and a store may need; macOS allows 256 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
