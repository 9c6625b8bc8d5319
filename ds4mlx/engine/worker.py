"""The loop of the one thread that owns MLX and the decode states.

A turn: what has been asked for meanwhile, one decoding step of all sequences, one chunk of one prompt,
and the events of it all to their readers.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

import mlx.core as mx

from ds4mlx.engine.admission import Places
from ds4mlx.engine.answers import Outbox
from ds4mlx.engine.decoding import Decoding, Taken
from ds4mlx.engine.prefill import PREFILL_STEP, prefill_chunk
from ds4mlx.engine.request import Event, Failed, Started, Status, Stopping
from ds4mlx.engine.running import Job, Running
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.text.tokenizer import Tokenizer

LOG = logging.getLogger("ds4mlx.serve")

# Most tokens of a prompt between two steps of sequences that are being decoded.
SHARED_STEP = 512
# Unread events with which a sequence pauses, those with which it goes on, and seconds it may pause.
MOST_UNREAD, FEW_UNREAD, PATIENCE = 256, 128, 60.0


class Worker:
    """Everything that only the thread touches."""

    def __init__(self, model: Model, tokenizer: Tokenizer, places: Places, aligned: bool):
        self.model, self.tokenizer, self.places, self.aligned = model, tokenizer, places, aligned
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.status = Status()
        self._outbox = Outbox()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Running] = deque()  # prompts, in the order of their turns
        self._paused: list[Running] = []
        self._decoding, self._decoded = Decoding(model), list[Running]()
        self._stopped = False

    def run(self) -> None:
        """Until `stop` is among the commands."""
        while not self._stopped:
            self._take_commands()
            try:
                self._turn()
            except Exception as error:
                LOG.exception("a turn of the scheduler failed")
                self._fail_all(_failure(error))
            self._tell()

    def enqueue(self, job: Job) -> None:
        """A command: have a job wait for its turn."""
        self._waiting.append(job)

    def stop(self) -> None:
        """A command: end everything, and the loop."""
        self._fail_all(Stopping())
        self._stopped = True

    def _take_commands(self) -> None:
        idle = not (self._waiting or self._reading or self._decoded)
        try:
            if idle:
                self.commands.get(timeout=1.0 if self._paused else None)()
            while True:
                self.commands.get_nowait()()
        except Empty:
            pass

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._pause()
        if self._decoded:
            self._step()
        if self._reading:
            self._tell()  # a chunk takes long
            self._read_on(self._reading.popleft())

    def _tell(self) -> None:
        running = len(self._reading) + len(self._decoded) + len(self._paused)
        self.status = Status(running=running, waiting=len(self._waiting))
        self._outbox.hand_over()

    # Joining and leaving

    def _admit(self) -> None:
        while self._waiting and self._running() < self.places.max_batch:
            job = self._waiting.popleft()
            running = Running(job, self.model.make_cache(), self.tokenizer)
            self._outbox.put(job.answer, Started(len(job.ids), 0, ""))
            self._reading.append(running)

    def _running(self) -> int:
        return len(self._reading) + len(self._decoded)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._waiting if job.answer.cancelled]:
            self._waiting.remove(job)
            self.places.free()
        for running in [*self._reading, *self._decoded, *self._paused]:
            if running.job.answer.cancelled:
                self._leave(running)

    def _leave(self, running: Running, event: Event | None = None) -> None:
        """Have a request end, with its last event unless nobody waits for it."""
        for held in (self._reading, self._decoded, self._paused):
            if running in held:
                held.remove(running)
        self._decoding.remove(running.sequence)
        self.places.free()
        if event is not None:
            self._outbox.put(running.job.answer, event)

    def _fail_all(self, error: DataError) -> None:
        for running in [*self._reading, *self._decoded, *self._paused]:
            self._leave(running, Failed(error))
        for job in self._waiting:
            self._outbox.put(job.answer, Failed(error))
            self.places.free()
        self._waiting.clear()

    def _pause(self) -> None:
        """Sequences whose readers are behind leave the steps, and come back."""
        for running in [r for r in self._decoded if r.job.answer.unread > MOST_UNREAD]:
            self._decoding.remove(running.sequence)
            self._decoded.remove(running)
            self._paused.append(running)
            running.paused_at = time.monotonic()
            running.job.answer.resume_below = FEW_UNREAD
        for running in list(self._paused):
            answer = running.job.answer
            if answer.unread < FEW_UNREAD and self._running() < self.places.max_batch:
                self._paused.remove(running)
                self._join(running)
            elif time.monotonic() - (running.paused_at or 0) > PATIENCE:
                self._leave(running, Failed(DataError("the answer was not read for too long")))

    def _join(self, running: Running, logits: mx.array | None = None, before: int = 0) -> None:
        self._decoding.add(running.sequence, logits, before)
        self._decoded.append(running)

    # Reading prompts

    def _read_on(self, running: Running) -> None:
        """The next chunk of a prompt; after the last one its sequence joins the others."""
        state, ids = running.state, running.job.ids
        somebody_waits = self._decoded or any(r.left < PREFILL_STEP for r in self._reading)
        step = SHARED_STEP if self.aligned or somebody_waits else PREFILL_STEP
        start, end = state.offset, min(len(ids), (state.offset // step + 1) * step)
        try:
            logits = prefill_chunk(self.model, ids[start:end], state, end == len(ids))
            if logits is None:
                self._reading.append(running)
                return
            running.read()
            if running.sequence.max_tokens:
                self._join(running, logits, running.cached)
                return
        except Exception as error:
            LOG.exception("a chunk of a prompt failed")
            self._leave(running, Failed(_failure(error)))
            return
        self._leave(running, running.ended())

    # Decoding

    def _step(self) -> None:
        """A token of each sequence. Where the step fails, each is tried alone."""
        thinking = {id(r.sequence): r.sequence.thinking for r in self._decoded}
        try:
            taken = self._decoding.step()
        except Exception as error:
            LOG.exception("a decoding step failed")
            if len(self._decoded) == 1:
                self._leave(self._decoded[0], Failed(_failure(error)))
                return
            taken = self._one_by_one()
        owner = {id(running.sequence): running for running in self._decoded}
        for each in taken:
            running = owner[id(each.sequence)]
            self._took(running, each, thinking[id(each.sequence)])

    def _one_by_one(self) -> list[Taken]:
        """A step of each sequence alone; those that fail end."""
        taken = list[Taken]()
        for running, alone in zip(list(self._decoded), self._decoding.apart(), strict=True):
            try:
                taken += alone.step()
            except Exception as error:
                LOG.exception("a decoding step of one sequence failed")
                self._leave(running, Failed(_failure(error)))
                continue
            if alone:
                self._decoding.add(running.sequence)
        return taken

    def _took(self, running: Running, taken: Taken, thinking: bool) -> None:
        if taken.error is not None:
            self._leave(running, Failed(taken.error))
            return
        piece = running.took(taken, thinking)
        if piece is not None:
            self._outbox.put(running.job.answer, piece)
        if running.sequence.reason:
            self._leave(running, running.ended())


def _failure(error: Exception) -> DataError:
    """What a reader is told of an error."""
    if isinstance(error, DataError):
        return error
    return DataError(f"the computation failed: {type(error).__name__}: {error}")
