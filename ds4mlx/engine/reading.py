"""Prompts of requests that are read in turn, a chunk of one of them at a time."""

import logging
from collections import deque
from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.engine.prefill import prefill_chunk
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.engine.running import Running
from ds4mlx.engine.steps import failure
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model

LOG = logging.getLogger("ds4mlx")

# Most tokens of a chunk while somebody waits for its end.
SHARED_STEP = 512


@dataclass(frozen=True)
class Chunk:
    """A chunk that was read. logits: (1, vocab) after the prompt's last one; error: if it failed."""

    running: Running
    logits: mx.array | None = None
    error: DataError | None = None


class Reading:
    """Requests whose prompts are being read.

    aligned: chunks end at multiples of SHARED_STEP tokens whatever else runs. Otherwise they are
    larger where nobody is decoded and no other prompt is about to be done.
    """

    def __init__(self, model: Model, aligned: bool):
        self.model, self.aligned = model, aligned
        self.members: deque[Running] = deque()  # in the order of their turns

    def remove(self, running: Running) -> None:
        """Have a request leave, if it is in; its state is that of the chunks that were read."""
        if running in self.members:
            self.members.remove(running)

    def next(self, somebody_waits: bool) -> Chunk:
        """Read the next chunk of the prompt whose turn it is. A prompt that is done leaves."""
        running = self.members.popleft()
        state, ids = running.state, running.job.ids
        waits = somebody_waits or any(other.left < PREFILL_STEP for other in self.members)
        step = SHARED_STEP if self.aligned or waits else PREFILL_STEP
        start, end = state.offset, min(len(ids), (state.offset // step + 1) * step)
        try:
            logits = prefill_chunk(self.model, ids[start:end], state, end == len(ids))
        except Exception as error:
            LOG.exception("a chunk of a prompt failed")
            return Chunk(running, error=failure(error))
        if logits is None:
            self.members.append(running)
        return Chunk(running, logits)
