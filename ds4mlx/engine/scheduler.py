"""Requests of several clients to one model: the event loop's side of the thread that runs it."""

import asyncio
import threading
from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine.admission import Places
from ds4mlx.engine.answers import Answer
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

    context: most tokens of a prompt and its answer; the model's own unless told. max_batch: how many
    sequences are worked on together, max_queue: how many more may wait. aligned: prompts are read in
    chunks that end at multiples of 512 tokens whatever else runs, and no prefix is reused, so that a
    text does not depend on other requests. reuse: whether prefixes are reused.
    replay: text by the id of a call in it, as remembered; for the event loop.
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
    ):
        check_count("max_batch", max_batch, 1, MOST_STEPPED + 1)
        check_count("max_queue", max_queue)
        longest = model.args.max_position_embeddings
        check_count("context", longest if context is None else context, 2, longest + 1)
        self.context = context or longest
        self._config, self._tokenizer = model.args, tokenizer
        self._places = Places(max_batch, max_queue)
        # What this thread has not computed yet, another one cannot.
        mx.eval(model.parameters())
        self._worker = Worker(model, tokenizer, self._places, aligned)
        self._thread = threading.Thread(target=self._worker.run, name="scheduler", daemon=True)
        self.replay: Mapping[str, str] = {}

    def start(self) -> None:
        """Start the thread. Requests may be submitted before."""
        self._thread.start()

    def close(self, deadline: float) -> None:
        """Refuse new requests, end all others with `Failed(Stopping)`, save, and stop the thread.

        Returns after at most `deadline` seconds.
        """
        self._places.close()
        self._worker.commands.put(self._worker.stop)
        if self._thread.is_alive():
            self._thread.join(deadline)

    async def submit(self, request: Request) -> Answer:
        """Have a request join the queue; returns as soon as its place is sure.

        Raises Busy, NoMemory, TooLong, Stopping, or DataError for what cannot be.
        """
        self._places.take()
        try:
            job = await self._job(request)
        except BaseException:
            self._places.free()
            raise
        self._worker.commands.put(partial(self._worker.enqueue, job))
        return job.answer

    async def count(self, prompt: Prompt | list[int]) -> int:
        """Tokens of a prompt, as its answer will say."""
        return len(await self._ids(prompt))

    def status(self) -> Status:
        """How it does. Never waits."""
        return self._worker.status

    async def _job(self, request: Request) -> Job:
        for option in ("max_tokens", "thinking_budget", "logprobs"):
            value = getattr(request, option)
            if value is not None:
                check_count(option, value)
        StopStrings(request.stop)
        ids = await self._ids(request.prompt)
        if not ids:
            raise DataError("the prompt is empty")
        most = self.context - (request.max_tokens != 0)
        if len(ids) > most:
            raise TooLong(len(ids), most)
        check_ids(self._config, ids)
        room = self.context - len(ids)
        length = room if request.max_tokens is None else min(room, request.max_tokens)
        return Job(request, Answer(self._wake), ids, length)

    async def _ids(self, prompt: Prompt | list[int]) -> list[int]:
        if isinstance(prompt, Prompt):
            return await asyncio.to_thread(self._tokenizer.encode_segments, prompt)
        return [int(token) for token in prompt]

    def _wake(self) -> None:
        self._worker.commands.put(lambda: None)
