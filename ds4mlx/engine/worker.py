"""The loop of the one thread that owns MLX, the decode states and the KV store.

A turn: what has been asked for meanwhile, one decoding step of all sequences, one chunk of one prompt,
and the events of it all to their readers.
"""

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue

from ds4mlx.engine.admission import Places, StateMemory
from ds4mlx.engine.answers import Outbox
from ds4mlx.engine.counts import Counts
from ds4mlx.engine.kept import Plan
from ds4mlx.engine.machine import OutOfMemory
from ds4mlx.engine.prefixes import Prefixes
from ds4mlx.engine.reading import Reading
from ds4mlx.engine.request import Event, Failed, NoMemory, Status, Stopping
from ds4mlx.engine.running import Job, Running
from ds4mlx.engine.steps import Outcome, Steps, failure
from ds4mlx.engine.waiting import Waiting
from ds4mlx.errors import DataError

LOG = logging.getLogger("ds4mlx")

# Turns between two looks at the memory that growing states take.
LOOK = 64


class Worker:
    """Everything that only the thread touches.

    prefixes: the states that are kept. reuse: whether prompts begin with them. aligned: see
    `Reading`.
    """

    def __init__(
        self, prefixes: Prefixes, places: Places, memory: StateMemory, aligned: bool, reuse: bool
    ):
        self.prefixes, self.places, self.memory = prefixes, places, memory
        self.reuse = reuse
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.status = Status()
        self._counts, self._outbox = Counts(), Outbox()
        self._waiting = Waiting(self._plan)
        self._reading = Reading(prefixes.model, aligned)
        self._steps = Steps(prefixes.model, places.max_batch)
        self._stopped, self._turns = False, 0

    def run(self) -> None:
        """Until `stop` is among the commands."""
        while not self._stopped:
            try:
                self._take_commands()
                self._turn()
                self._tell()
            except Exception as error:
                LOG.exception("a turn of the scheduler failed")
                self._recover(error)

    def _recover(self, error: Exception) -> None:
        """End all requests after an error that is none of theirs; the thread goes on in any case."""
        try:
            self._fail_all(failure(error))
        except Exception:
            LOG.exception("not all requests could be ended")
        self._outbox.hand_over()

    # Commands

    def enqueue(self, job: Job) -> None:
        """Have a job wait for its turn."""
        self._counts.add("requests")
        self._waiting.jobs.append(job)

    def count(self, ids: list[int]) -> int:
        """Tokens of a prompt as it would be spelled now."""
        return len(self._plan(ids).ids)

    def stop(self, until: float) -> None:
        """End everything, save until that time, and end the loop."""
        self._fail_all(Stopping())
        self._tell()
        self._stopped = True
        self.prefixes.save_all(until)

    def _take_commands(self) -> None:
        wait = bool(self._waiting.jobs) and not self._waiting.blocked
        idle = not (wait or self._reading.members or self._steps.decoded)
        try:
            if idle:
                # The speed that the status shows falls to nothing, and patience ends.
                looks = self._steps.paused or self.status.tokens_per_second
                self.commands.get(timeout=1.0 if looks else None)()
            while True:
                self.commands.get_nowait()()
        except Empty:
            pass

    # A turn

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        for running in self._steps.pause(self.places.max_batch - self._active()):
            self._leave(running, Failed(DataError("the answer was not read for too long")))
        for outcome in self._steps.step():
            self._took(outcome)
        self._turns += 1
        if self._turns % LOOK == 0:
            self._look_at_memory()
        if self._reading.members:
            self._tell()  # a chunk takes long
            self._read_on()

    def _tell(self) -> None:
        running = len(self._all())
        nbytes = self.prefixes.nbytes + self.memory.budget - self._room()
        self.status = self._counts.status(running, len(self._waiting.jobs), nbytes)
        self._outbox.hand_over()

    def _all(self) -> list[Running]:
        return [*self._reading.members, *self._steps.members]

    def _active(self) -> int:
        return len(self._reading.members) + len(self._steps.decoded)

    # Joining and leaving

    def _admit(self) -> None:
        """Begin with jobs that wait."""
        while self._active() < self.places.max_batch:
            job = self._waiting.next(lambda job: self._room_beside(job) >= 0 or not self._all())
            if job is None:
                return
            self._waiting.remove(job)
            try:
                self._begin(job, max(self._room_beside(job), 0))
            except Exception as error:  # noqa: BLE001 - it is told and logged
                self._refuse(job, error)

    def _plan(self, ids: list[int]) -> Plan:
        return self.prefixes.plan(ids) if self.reuse else Plan(ids)

    def _begin(self, job: Job, room: int) -> None:
        plan = job.plan or Plan(job.ids)
        if len(plan.ids) >= job.context:  # the spelling that is kept has more tokens than fit
            plan = Plan(job.ids)
        job.ids = plan.ids
        state = self.prefixes.begin(plan, room)
        running = Running(job, plan, state, self.prefixes.tokenizer)
        if self.reuse:
            running.kept = self.prefixes.work_on(running.sequence.tokens, state)
        self._reading.members.append(running)
        self.prefixes.shrink(room)
        self._counts.add("prompt_tokens", len(job.ids))
        self._counts.add("cached_tokens", running.cached)
        self._outbox.put(job.answer, running.started)

    def _refuse(self, job: Job, error: Exception | None) -> None:
        """Have a job end that never began; without an error nobody waits for it."""
        event = None if error is None else Failed(failure(error))
        if error is not None and not isinstance(error, DataError):
            LOG.error("a request could not begin", exc_info=error)
        self._end(job, event)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._waiting.jobs if job.answer.cancelled]:
            self._waiting.remove(job)
            self._refuse(job, None)
        for running in self._all():
            if running.job.answer.cancelled:
                self._leave(running)

    def _leave(self, running: Running, event: Event | None = None) -> None:
        """Have a request end, with its last event unless nobody waits for it."""
        self._reading.remove(running)
        self._steps.remove(running)
        LOG.info("%s", running.told(event))
        self._end(running.job, event)
        if running.kept is not None:
            self.prefixes.rest(running.kept)
            self.prefixes.shrink(max(self._room(), 0))
        else:
            self.prefixes.give_up(running.state)
        if isinstance(event, Failed) and isinstance(event.error, OutOfMemory):
            self.prefixes.shrink(self.prefixes.nbytes // 2, running.kept)

    def _end(self, job: Job, event: Event | None) -> None:
        """Give a job's place back, and tell its reader, if there is one."""
        self.places.free()
        self._waiting.somebody_left()
        if event is not None:
            self._outbox.put(job.answer, event)
        self._counts.ended(event, self.prefixes.stored_bytes)

    def _fail_all(self, error: DataError) -> None:
        for running in self._all():
            self._leave(running, Failed(error))
        for job in list(self._waiting.jobs):
            self._waiting.remove(job)
            self._refuse(job, error)

    # Memory

    def _room(self) -> int:
        """Bytes that those who are worked on leave, with what they will need soon."""
        return self.memory.budget - sum(self.memory.of_job(running.job) for running in self._all())

    def _room_beside(self, job: Job) -> int:
        return self._room() - self.memory.of_job(job)

    def _look_at_memory(self) -> None:
        """Make room for what has grown; where that does not do, the newest request ends."""
        room = self._room()
        self.prefixes.shrink(max(room, 0))
        if room < 0 and len(self._all()) > 1:
            newest = max(self._all(), key=lambda running: running.begun)
            error = NoMemory(newest.job.tokens, self.memory.of_job(newest.job), self.memory.budget)
            self._leave(newest, Failed(error))

    # Work

    def _read_on(self) -> None:
        """The next chunk of a prompt; after the last one its sequence joins the others."""
        chunk = self._reading.next(bool(self._steps.decoded))
        running = chunk.running
        self._counts.add("chunks")
        if chunk.error is not None:
            self._leave(running, Failed(chunk.error))
            return
        running.advanced()
        if chunk.logits is None:
            return
        running.read()
        if not running.sequence.max_tokens:
            self._leave(running, running.ended())
            return
        try:
            self._steps.join(running, chunk.logits, running.cached)
        except Exception as error:
            LOG.exception("the first token of an answer could not be drawn")
            self._leave(running, Failed(failure(error)))

    def _took(self, outcome: Outcome) -> None:
        """Tell what a step brought."""
        running = outcome.running
        if outcome.taken is None or outcome.error is not None:
            error = outcome.error or DataError("no token could be drawn")
            self._leave(running, Failed(error))
            return
        self._counts.took()
        running.advanced()
        piece = running.took(outcome.taken, outcome.thinking)
        if piece is not None:
            self._outbox.put(running.job.answer, piece)
        if running.sequence.reason:
            self._leave(running, running.ended())
