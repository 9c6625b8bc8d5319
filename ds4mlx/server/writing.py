"""Answers whose protocol tells them in ordered, named events: streamed, and whole.

A whole answer is what its events make, so that both say the same.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from sse_starlette.event import ServerSentEvent
from starlette.types import Receive

from ds4mlx.engine.request import Ended, Failed
from ds4mlx.server.answering import Event, Turn, unless_gone
from ds4mlx.server.errors import refusal_of
from ds4mlx.server.sse import event


class Writer(Protocol):
    """Makes of one event of a turn those of a protocol."""

    def add(self, event: Event) -> list[dict[str, Any]]: ...


async def streamed(
    turn: Turn,
    writer: Writer,
    first: list[dict[str, Any]],
    ended: Callable[[], None] = lambda: None,
) -> AsyncIterator[ServerSentEvent]:
    """The events of a turn behind the first ones; `ended` is called before the last are told."""
    for made in first:
        yield event(made, made["type"])
    async for each in turn:
        events = writer.add(each)
        if isinstance(each, Ended | Failed):
            ended()
        for made in events:
            yield event(made, made["type"])


async def is_written(turn: Turn, writer: Writer, receive: Receive) -> bool:
    """Whether a turn has come to its end; not where its client leaves before.

    Raises a Refusal for an answer that failed on its way.
    """

    async def read() -> bool:
        async for each in turn:
            if isinstance(each, Failed):
                raise refusal_of(each.error, 500) from each.error
            writer.add(each)
            if isinstance(each, Ended):
                return True
        return False

    return bool(await unless_gone(turn, receive, read()))
