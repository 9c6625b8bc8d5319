"""One request while the thread works on it: its sequence, its clock, and the events it makes."""

import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4mlx.engine.answers import Answer
from ds4mlx.engine.decoding import Taken
from ds4mlx.engine.request import Ended, Piece, Request, TokenProbs
from ds4mlx.engine.sampling import log_probs
from ds4mlx.engine.sequence import Sequence
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.text.tokenizer import Tokenizer


@dataclass
class Job:
    """A request that has a place: its token ids, and how many tokens may follow them."""

    request: Request
    answer: Answer
    ids: list[int]
    most: int

    @property
    def reaches_context(self) -> bool:
        """Whether it is the context that bounds the answer, and not the request."""
        return self.request.max_tokens is None or self.most < self.request.max_tokens


class Running:
    """A job with a state. The prompt is read first; then its sequence is decoded."""

    def __init__(self, job: Job, state: DecodeState, tokenizer: Tokenizer):
        request = job.request
        options = {"rule": request.rule, "thinking_budget": request.thinking_budget}
        self.job, self.tokenizer = job, tokenizer
        self.sequence = Sequence(
            job.ids,
            state,
            tokenizer,
            sampler=request.sampler,
            stop=request.stop,
            max_tokens=job.most,
            **{name: value for name, value in options.items() if value is not None},
        )
        self.cached = state.offset
        self.reasoning_tokens = 0
        self.paused_at: float | None = None
        self._probs: list[TokenProbs] = []
        self._begun, self._decoded_from = time.perf_counter(), 0.0

    @property
    def state(self) -> DecodeState:
        """The state of the sequence."""
        return self.sequence.state

    @property
    def left(self) -> int:
        """How many tokens of the prompt have not been read."""
        return len(self.job.ids) - self.state.offset

    def read(self) -> None:
        """The prompt has been read."""
        self._decoded_from = time.perf_counter()

    def took(self, taken: Taken, thinking: bool) -> Piece | None:
        """What a token brings; None where nothing can be shown yet.

        thinking: whether the sequence was in its thought before it.
        """
        self.reasoning_tokens += thinking
        if self.job.request.logprobs is not None and taken.token != self.tokenizer.eos_token_id:
            self._probs.append(self._token_probs(taken, self.job.request.logprobs))
        if not taken.text and not (self._probs and self.sequence.reason):
            return None
        probs, self._probs = tuple(self._probs), []
        return Piece(taken.text, thinking, probs)

    def ended(self) -> Ended:
        """The event of the end, with the reason and the speeds."""
        now = time.perf_counter()
        read_by = self._decoded_from or now
        fed = len(self.job.ids) - self.cached
        return Ended(
            self._reason(),
            None,
            self.sequence.drawn,
            self.reasoning_tokens,
            fed / max(read_by - self._begun, 1e-9),
            self.sequence.drawn / max(now - read_by, 1e-9),
        )

    def _reason(self) -> str:
        if self.sequence.reason in (None, "length"):
            return "context" if self.job.reaches_context else "length"
        return "stop_sequence" if self.sequence.stops.reached else self.sequence.reason

    def _token_probs(self, taken: Taken, count: int) -> TokenProbs:
        values = np.array(log_probs(taken.logits)[0].astype(mx.float32))
        best = np.argsort(-values, kind="stable")[:count].tolist()
        spelled = self.tokenizer.token_bytes
        top = tuple((spelled(token), float(values[token])) for token in best)
        return TokenProbs(taken.token, spelled(taken.token), float(values[taken.token]), top)
