"""Answers as server-sent events; the protocols say which."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from ds4mlx.server.answering import Turn

_SEPARATOR = "\n"


class Stream(EventSourceResponse):
    """The events of a turn, which is given up when the client leaves or the stream ends.

    The turn's own `KeepAlive`s are to become events or comments: nothing is sent beside `events`.
    """

    def __init__(self, events: AsyncIterator[ServerSentEvent], turn: Turn):
        super().__init__(_told(events, turn), ping=0, sep=_SEPARATOR)
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.cancel()


async def _told(
    events: AsyncIterator[ServerSentEvent], turn: Turn
) -> AsyncIterator[ServerSentEvent]:
    async for each in events:
        turn.told_at = time.monotonic()
        yield each


def event(data: Any, name: str | None = None) -> ServerSentEvent:
    """An event whose data is JSON, or text such as [DONE] as it is."""
    text = data if isinstance(data, str) else to_json(data)
    return ServerSentEvent(text, event=name, sep=_SEPARATOR)


def comment(text: str) -> ServerSentEvent:
    """A line that every client passes over."""
    return ServerSentEvent(comment=text, sep=_SEPARATOR)


def to_json(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
