"""An answer on its way to a client, whatever the protocol: deltas of a message, and its end.

A `Turn` joins what the scheduler gives, pieces of text, with what the chat encoding makes of them,
and adds a sign of life wherever nothing comes for a while.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive

from ds4mlx.chat.streaming import Completion, Content, Delta
from ds4mlx.engine.request import Ended, Failed, Piece, Started, TokenProbs
from ds4mlx.engine.scheduler import Answer
from ds4mlx.errors import DataError
from ds4mlx.server.cut_calls import without_begun
from ds4mlx.server.errors import refusal_of

LOG = logging.getLogger("ds4mlx")
Result = TypeVar("Result")

# Seconds in which nothing is told, and then in which nothing happens, before a `KeepAlive` comes; so a
# client waits at most for twice as long. Clients give up after 15 or more.
KEEP_ALIVE = 5.0
# Why an answer ends that nobody cut in its calls: by itself, or at a stop text, which is not looked for
# in them.
_UNCUT = ("stop", "stop_sequence")


@dataclass(frozen=True)
class KeepAlive:
    """Nothing has come for a while, and the answer goes on."""


@dataclass(frozen=True)
class Tokens:
    """Tokens with their log-probabilities; the deltas of their text follow, now or later."""

    tokens: tuple[TokenProbs, ...]
    thinking: bool


@dataclass(frozen=True)
class Whole:
    """An answer that has ended. message: as `parse_completion` gives it."""

    message: dict[str, Any]
    ended: Ended
    tokens: tuple[TokenProbs, ...]


Event = Started | Tokens | Delta | KeepAlive | Ended | Failed
Remember = Callable[[list[str], str], Awaitable[None]]


@dataclass(eq=False)
class Turn:
    """One answer, to be read once: as events, or whole.

    id: the protocol's own name of it. completion: None for plain text, all of which is content.
    remember: called with the ids of calls and their exact text before the end is told.
    told_at: when its reader last told a client something. Much of an answer may not be told: what
    could become markup, a value of a call that is known only as a whole, a thought left out.
    """

    id: str
    answer: Answer
    completion: Completion | None
    remember: Remember
    closed: Callable[["Turn"], None] = field(default=lambda turn: None)
    told_at: float = field(default_factory=time.monotonic)
    _text: list[str] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """The message so far or, after the end, whole."""
        if self.completion is None:
            return {"role": "assistant", "content": "".join(self._text), "tool_calls": []}
        return self.completion.message

    def cancel(self) -> None:
        """Give the answer up; nothing happens if it has ended."""
        self.answer.cancel()
        self.closed(self)

    def end_thinking(self) -> None:
        """End the reasoning, if it still goes on; the answer follows."""
        self.answer.end_thinking()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def whole(self) -> Whole:
        """The answer at its end. Raises Refusal where it fails."""
        tokens: list[TokenProbs] = []
        async for event in self:
            if isinstance(event, Tokens) and not event.thinking:
                tokens += event.tokens
            elif isinstance(event, Failed):
                raise refusal_of(event.error, 500) from event.error
            elif isinstance(event, Ended):
                return Whole(self.message, event, tuple(tokens))
        raise asyncio.CancelledError

    async def _events(self) -> AsyncIterator[Event]:
        try:
            async with contextlib.aclosing(paced(self.answer, KEEP_ALIVE)) as events:
                async for event in events:
                    for made in self._made(event):
                        yield made
                    if isinstance(event, Ended):
                        await self._remember()
                    if not isinstance(event, Piece):
                        yield event
                    elif time.monotonic() - self.told_at >= KEEP_ALIVE:
                        self.told_at = time.monotonic()
                        yield KeepAlive()
        finally:
            self.cancel()

    def _made(self, event: Any) -> list[Event]:
        """What is known with this event, and was not before it."""
        if isinstance(event, Ended) and self.completion is not None:
            last = self.completion.finish()
            if event.reason not in _UNCUT:
                last = without_begun(self.message, self.completion.given, last)
            return [*last]
        if not isinstance(event, Piece):
            return []
        tokens: list[Event] = [Tokens(event.tokens, event.thinking)] if event.tokens else []
        return [*tokens, *self._deltas(event.text)]

    def _deltas(self, text: str) -> list[Delta]:
        if self.completion is not None:
            return self.completion.add(text)
        self._text.append(text)
        return [Content(text)] if text else []

    async def _remember(self) -> None:
        """Note how calls were written. An answer without that is whole, only its replay is not."""
        if self.completion is None or not self.completion.sampled:
            return
        ids = [call["id"] for call in self.completion.message["tool_calls"]]
        try:
            await self.remember(ids, self.completion.sampled)
        except (DataError, OSError) as error:
            LOG.warning("%s: the text of its calls was not kept: %s", self.id, error)


async def paced(answer: AsyncIterator[Any], seconds: float) -> AsyncGenerator[Any, None]:
    """The events of an iterator, with a `KeepAlive` wherever none comes for so long."""
    iterator = aiter(answer)
    waiting: asyncio.Future[Any] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield KeepAlive()
                continue
            reached, waiting = waiting, None
            try:
                event = reached.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()


async def whole_unless_gone(turn: Turn, receive: Receive) -> Whole | None:
    """The whole answer; None, and the turn given up, where the client leaves before."""
    return await unless_gone(turn, receive, turn.whole())


async def unless_gone(turn: Turn, receive: Receive, reading: Awaitable[Result]) -> Result | None:
    """What reading a turn gives; None, and the turn given up, where the client leaves before."""
    answering = asyncio.ensure_future(reading)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        done, _ = await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering in done else None
    finally:
        answering.cancel()
        leaving.cancel()
        turn.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
