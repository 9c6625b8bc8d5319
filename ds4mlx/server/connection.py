"""A connection, by h11: with deadlines for headers and for readers, and errors that are JSON.

uvicorn waits for ever for the rest of a request's headers, and for a reader that takes nothing.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ds4mlx.server.errors import OPENAI, Refusal
from ds4mlx.server.safety import Limits


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """The class of connections within these limits, as uvicorn's option `http`."""

    class Connection(_Connection):
        pass

    Connection.limits = limits
    return Connection


class _Connection(H11Protocol):
    """Adds timers and a limit of connections to uvicorn's."""

    limits = Limits()
    _headers_due: asyncio.TimerHandle | None = None
    _reader_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, f"more than {self.limits.connections} connections are open")
        else:
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due = _stopped(self._headers_due)
        self._reader_due = _stopped(self._reader_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next request has begun already
            self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader_due is None:
            seconds = self.limits.stalled_seconds
            self._reader_due = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_due = _stopped(self._reader_due)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _watch_headers(self) -> None:
        """Time runs from a connection's beginning, later from a request's first bytes."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._headers_due = _stopped(self._headers_due)
        elif self._headers_due is None:
            seconds = self.limits.header_seconds
            self._headers_due = self.loop.call_later(seconds, self._headers_are_late)

    def _headers_are_late(self) -> None:
        self._headers_due = None
        self._refuse(408, f"the headers did not come within {self.limits.header_seconds:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        """Say what is wrong, if nothing else is being said, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(OPENAI.body(Refusal(status, message), "")).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers.append((b"content-length", str(len(body)).encode()))
            response = h11.Response(status_code=status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # whose answer would come after this one
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
