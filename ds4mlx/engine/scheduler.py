"""Requests of several clients to one model: the event loop's side of the thread that runs it."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial

import mlx.core as mx

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine.admission import Places, StateMemory
from ds4mlx.engine.answers import Answer
from ds4mlx.engine.prefixes import Prefixes
from ds4mlx.engine.replay import Replay
from ds4mlx.engine.request import Request, Status, TooLong
from ds4mlx.engine.requests import check_count, check_ids
from ds4mlx.engine.running import Job
from ds4mlx.engine.worker import Worker
from ds4mlx.errors import DataError
from ds4mlx.model.model import MOST_STEPPED, Model
from ds4mlx.store import KVStore
from ds4mlx.text.stops import StopStrings
from ds4mlx.text.tokenizer import Tokenizer


class Scheduler:
    """Runs requests, several at a time, in a thread that owns the model, the states and the store.

    store: where states outlive memory and process; nobody else may use it. context: most tokens of a
    prompt and its answer; the model's own unless told. max_batch: how many requests are worked on
    together, max_queue: how many more may wait. aligned: prompts are read in chunks that end at
    multiples of 512 tokens whatever else runs, and no prefix is reused, so that an answer does not
    depend on other requests. reuse: whether prefixes are reused. memory: bytes for states; what the
    model leaves of the machine's unless told.
    replay: text by the id of a call in it, as remembered. Any thread may read it. Changes of the model
    that are in force where it is made, such as `model.steer`, hold for all its requests.
    Raises DataError for options out of range.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        store: KVStore | None = None,
        context: int | None = None,
        max_batch: int = MOST_STEPPED,
        max_queue: int = 32,
        aligned: bool = False,
        reuse: bool = True,
        memory: int | None = None,
    ):
        check_count("max_batch", max_batch, 1, MOST_STEPPED + 1)
        check_count("max_queue", max_queue)
        longest = model.args.max_position_embeddings
        check_count("context", longest if context is None else context, 2, longest + 1)
        self.context = context or longest
        self._config, self._tokenizer = model.args, tokenizer
        # What this thread has not computed yet, another one cannot.
        mx.eval(model.parameters())
        self._places = Places(max_batch, max_queue)
        self._memory = StateMemory(model, self.context, store is not None, memory)
        prefixes = Prefixes(model, tokenizer, store)
        reuse = reuse and not aligned
        self.worker = Worker(prefixes, self._places, self._memory, aligned, reuse)
        self.replay = Replay(store.calls.path if store is not None else None)
        run = partial(copy_context().run, self.worker.run)
        self._thread = threading.Thread(target=run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread. Requests may be submitted before."""
        self._thread.start()

    def close(self, deadline: float) -> None:
        """Refuse new requests, end all others with `Failed(Stopping)`, save, and stop the thread.

        Returns after at most `deadline` seconds.
        """
        self._places.close()
        if self._thread.ident is None:
            self._thread.start()
        self.worker.commands.put(partial(self.worker.stop, time.monotonic() + deadline))
        self._thread.join(deadline)

    @property
    def closed(self) -> bool:
        """Whether the thread has ended, so that nothing uses the model or the store any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def check_place(self) -> None:
        """Raises Busy or Stopping if nothing can join the queue now. Never waits."""
        self._places.check()

    async def submit(self, request: Request) -> Answer:
        """Have a request join the queue; returns as soon as its place is sure.

        Raises Busy, NoMemory, TooLong, Stopping, or DataError for what cannot be.
        """
        self._places.take()
        try:
            job = await self._job(request)
            self._send(partial(self.worker.enqueue, job))
        except BaseException:
            self._places.free()
            raise
        return job.answer

    async def count(self, prompt: Prompt | list[int]) -> int:
        """Tokens of a prompt, as its answer would say now. Raises Stopping, and DataError."""
        ids, loop = await self._ids(prompt), asyncio.get_running_loop()
        counted: asyncio.Future[int] = loop.create_future()

        def count() -> None:
            try:
                result = self.worker.count(ids)
            except Exception as error:  # noqa: BLE001 - it is raised where the count is waited for
                result = error
            loop.call_soon_threadsafe(_settle, counted, result)

        self._send(count)
        return await counted

    async def remember(self, ids: list[str], text: str) -> None:
        """Note, durably where there is a store, the text of the calls with these ids.

        Raises OSError.
        """
        await asyncio.to_thread(self.replay.remember, ids, text)

    def status(self) -> Status:
        """How it does. Never waits."""
        return self.worker.status

    async def _job(self, request: Request) -> Job:
        for option in ("max_tokens", "thinking_budget", "logprobs"):
            value = getattr(request, option)
            if value is not None:
                check_count(option, value)
        StopStrings(request.stop)
        ids = await self._ids(request.prompt)
        most = self.context - (request.max_tokens != 0)
        if len(ids) > most:
            raise TooLong(len(ids), most)
        if request.rule is not None:
            await asyncio.to_thread(request.rule.start, self._tokenizer)
        job = Job(request, Answer(self._wake), ids, self.context)
        self._memory.check(job)
        return job

    async def _ids(self, prompt: Prompt | list[int]) -> list[int]:
        if isinstance(prompt, Prompt):
            ids = await asyncio.to_thread(self._tokenizer.encode_segments, prompt)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise DataError("the prompt is empty")
        if len(ids) <= self.context:
            check_ids(self._config, ids)
        return ids

    def _send(self, command: Callable[[], None]) -> None:
        """Have the thread do something, which it surely will. Raises Stopping."""
        self._places.while_open(partial(self.worker.commands.put, command))

    def _wake(self) -> None:
        self.worker.commands.put(lambda: None)


def _settle(future: "asyncio.Future[int]", result: int | Exception) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
