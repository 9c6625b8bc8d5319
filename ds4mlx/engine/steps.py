"""Sequences of requests that are decoded together, and those that pause for their readers."""

import logging
import time
from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.engine.decoding import Decoding, Taken
from ds4mlx.engine.machine import memory_told
from ds4mlx.engine.running import Running
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model

LOG = logging.getLogger("ds4mlx")

# Unread events with which a sequence pauses, those with which it goes on, and seconds it may pause.
MOST_UNREAD, FEW_UNREAD, PATIENCE = 256, 128, 60.0


@dataclass(frozen=True)
class Outcome:
    """What a step brought a request: a token, or the error that ends it."""

    running: Running
    taken: Taken | None
    thinking: bool = False  # whether the token lies in a thought
    error: DataError | None = None


class Steps:
    """Up to `most` requests whose sequences take a token each in a step."""

    def __init__(self, model: Model, most: int):
        self.model, self.most = model, most
        self.decoded: list[Running] = []
        self.paused: list[Running] = []
        self._decoding = Decoding(model)

    @property
    def members(self) -> list[Running]:
        """Those that are decoded, and those that pause."""
        return [*self.decoded, *self.paused]

    def join(self, running: Running, logits: mx.array | None = None, before: int = 0) -> None:
        """Have a request join, as `Decoding.add` says."""
        self._decoding.add(running.sequence, logits, before)
        self.decoded.append(running)

    def remove(self, running: Running) -> None:
        """Have a request leave, if it is in; its state is that of its tokens but the last."""
        self._decoding.remove(running.sequence)
        for held in (self.decoded, self.paused):
            if running in held:
                held.remove(running)

    def pause(self, room: int) -> list[Running]:
        """Have those pause whose readers are behind, and at most `room` of them come back.

        Returns those whose readers did not come back in time.
        """
        for running in [r for r in self.decoded if r.job.answer.unread > MOST_UNREAD]:
            self.remove(running)
            self.paused.append(running)
            running.paused_at = time.monotonic()
            running.job.answer.resume_below = FEW_UNREAD
        for running in list(self.paused):
            if running.job.answer.unread < FEW_UNREAD and room > 0:
                self.paused.remove(running)
                self.join(running)
                room -= 1
        return [r for r in self.paused if time.monotonic() - r.paused_at > PATIENCE]

    def step(self) -> list[Outcome]:
        """A token of each sequence. Where the step fails, each is tried alone."""
        if not self.decoded:
            return []
        for running in self.decoded:
            if running.job.answer.thinking_ended:
                running.job.answer.thinking_ended = False
                running.sequence.end_thinking()
        owners = {id(running.sequence): running for running in self.decoded}
        thinking = {key: running.sequence.thinking for key, running in owners.items()}
        failed = list[Outcome]()
        try:
            taken = self._decoding.step()
        except Exception:
            LOG.exception("a decoding step failed; each sequence is tried alone")
            taken, failed = self._one_by_one(owners)
        outcomes = [
            Outcome(owners[key], each, thinking[key], each.error)
            for each in taken
            for key in [id(each.sequence)]
        ]
        return [*outcomes, *failed]

    def _one_by_one(self, owners: dict[int, Running]) -> tuple[list[Taken], list[Outcome]]:
        """A step of each sequence alone, and the errors of those that fail again."""
        taken, failed = list[Taken](), list[Outcome]()
        for alone in self._decoding.apart():
            (sequence,) = alone.sequences
            try:
                taken += alone.step()
            except Exception as error:
                LOG.exception("a decoding step of one sequence failed")
                failed.append(Outcome(owners[id(sequence)], None, error=failure(error)))
                continue
            if alone:
                self._decoding.add(sequence)
        return taken, failed


def failure(error: Exception) -> DataError:
    """What a reader is told of an error; `OutOfMemory` where that is what it is."""
    try:
        with memory_told("the answer cannot go on"):
            raise error
    except DataError as told:
        return told
    except Exception:  # noqa: BLE001 - the same error
        return DataError(f"the computation failed: {type(error).__name__}: {error}")
