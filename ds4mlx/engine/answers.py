"""Events on their way from the thread that makes them to the event loop that reads them."""

import asyncio
from collections import deque
from collections.abc import Callable

from ds4mlx.engine.request import Ended, Event, Failed, Started


class Answer:
    """The events of one request, an async iterator for one reader, on one event loop.

    `Started` comes first, `Ended` or `Failed` last. prompt_tokens, cached_tokens and source are
    those of `Started`, and are there as soon as it is.
    """

    def __init__(self, wake: Callable[[], None]):
        self.loop = asyncio.get_running_loop()
        self.prompt_tokens = self.cached_tokens = 0
        self.source = ""
        self.cancelled = self.thinking_ended = False
        self.given = self.read = 0  # events handed in by the thread, and taken out by the reader
        self.resume_below = 0  # a reader that comes below so many unread events wakes the thread
        self._wake, self._events = wake, deque[Event]()
        self._arrived, self._over = asyncio.Event(), False

    @property
    def unread(self) -> int:
        """How many events have not been read. Any thread may ask."""
        return self.given - self.read

    def cancel(self) -> None:
        """Have the request end as soon as it can; no more events come."""
        self.cancelled = self._over = True
        self._events.clear()
        self._arrived.set()
        self._wake()

    def end_thinking(self) -> None:
        """Have the thought end with the next token."""
        self.thinking_ended = True
        self._wake()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self.read += 1
        if self.unread < self.resume_below:
            self.resume_below = 0
            self._wake()
        self._over = isinstance(event, Ended | Failed)
        return event

    def arrived(self, event: Event) -> None:
        """Take an event that the thread has handed over; on the event loop."""
        if self.cancelled:
            return
        if isinstance(event, Started):
            self.prompt_tokens, self.cached_tokens = event.prompt_tokens, event.cached_tokens
            self.source = event.source
        self._events.append(event)
        self._arrived.set()


class Outbox:
    """Events that the thread has made in a turn, handed over all at once."""

    def __init__(self) -> None:
        self._events: list[tuple[Answer, Event]] = []

    def put(self, answer: Answer, event: Event) -> None:
        """Add an event."""
        answer.given += 1
        self._events.append((answer, event))

    def hand_over(self) -> None:
        """Give each event loop its events; requests of a loop that has closed are cancelled."""
        events, self._events = self._events, []
        for loop in {answer.loop for answer, _ in events}:
            ours = [(answer, event) for answer, event in events if answer.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, ours)
            except RuntimeError:
                for answer, _ in ours:
                    answer.cancelled = True


def _deliver(events: list[tuple[Answer, Event]]) -> None:
    for answer, event in events:
        answer.arrived(event)
