"""One request while the thread works on it: its sequence, its clock, and the events it makes."""

import time
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ds4mlx.engine.answers import Answer
from ds4mlx.engine.decoding import Taken
from ds4mlx.engine.kept import Kept, Plan
from ds4mlx.engine.request import Ended, Event, Failed, Piece, Request, Started, TokenProbs
from ds4mlx.engine.sampling import log_probs
from ds4mlx.engine.sequence import Sequence
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.text.tokenizer import Tokenizer


@dataclass(eq=False)
class Job:
    """A request that has a place: its token ids, and how many tokens prompt and answer may have.

    plan: how it will begin, as far as that is known. tokens: how many there are by now.
    """

    request: Request
    answer: Answer
    ids: list[int]
    context: int
    plan: Plan | None = None
    tokens: int = 0

    @property
    def room(self) -> int:
        """How many tokens may follow the prompt."""
        return self.context - len(self.ids)

    @property
    def most(self) -> int:
        """How many tokens the answer may have."""
        asked = self.request.max_tokens
        return self.room if asked is None else min(self.room, asked)


class Running:
    """A job with a state. The prompt is read first; then its sequence is decoded.

    kept: the state as others may share it, if they may.
    """

    def __init__(self, job: Job, plan: Plan, state: DecodeState, tokenizer: Tokenizer):
        request = job.request
        # Who else's state it was does not matter any more, and must not be held on to.
        self.job, self.tokenizer = job, tokenizer
        self.plan = job.plan = replace(plan, kept=None, awaited=None)
        self.sequence = Sequence(
            job.ids,
            state,
            tokenizer,
            sampler=request.sampler,
            stop=request.stop,
            until=request.until,
            max_tokens=job.most,
            rule=request.rule,
            thinking_budget=request.thinking_budget,
            guard=True,
        )
        self.kept: Kept | None = None
        self.cached = state.offset
        self.paused_at = 0.0
        self._probs: list[TokenProbs] = []
        self.begun, self._read_at = time.perf_counter(), 0.0

    @property
    def state(self) -> DecodeState:
        """The state of the sequence."""
        return self.sequence.state

    @property
    def left(self) -> int:
        """How many tokens of the prompt have not been read."""
        return len(self.job.ids) - self.state.offset

    @property
    def started(self) -> Started:
        """The event of the beginning."""
        return Started(len(self.job.ids), self.cached, self.plan.source if self.cached else "")

    def advanced(self) -> None:
        """The state has moved on: save what has come due."""
        self.job.tokens = len(self.sequence.tokens)
        if self.kept is not None:
            self.kept.save(lambda keeper: keeper.advanced())

    def read(self) -> None:
        """The prompt has been read."""
        self._read_at = time.perf_counter()

    def took(self, taken: Taken, thinking: bool) -> Piece | None:
        """What a token brings, in a thought or not; None where nothing can be shown yet."""
        if self.job.request.logprobs is not None and taken.token != self.tokenizer.eos_token_id:
            self._probs.append(self._token_probs(taken, self.job.request.logprobs))
        if not taken.text and not (self._probs and self.sequence.reason):
            return None
        probs, self._probs = tuple(self._probs), []
        return Piece(taken.text, thinking, probs)

    def ended(self) -> Ended:
        """The event of the end, with the reason and the speeds."""
        now = time.perf_counter()
        read_at = self._read_at or now
        sequence = self.sequence
        return Ended(
            self._reason(),
            sequence.stopped_by,
            sequence.drawn,
            sequence.thought_tokens,
            (len(self.job.ids) - self.cached) / max(read_at - self.begun, 1e-9),
            sequence.drawn / max(now - read_at, 1e-9),
        )

    def told(self, event: Event | None) -> str:
        """A line for the log: lengths, where the prefix came from, and the end; no text."""
        end = self.ended()
        how = "cancelled" if event is None else end.reason
        how = f"failed ({type(event.error).__name__})" if isinstance(event, Failed) else how
        source = f"{self.cached} from {self.plan.source}" if self.cached else "none reused"
        return (
            f"{self.job.request.label or 'request'}: prompt {len(self.job.ids)} tokens, {source} "
            f"({self.plan.why}), {end.prompt_tps:.1f} tokens/s; answer {end.completion_tokens} "
            f"tokens, {how}, {end.generation_tps:.1f} tokens/s"
        )

    def _reason(self) -> str:
        reason = self.sequence.reason or "length"
        if reason == "length":
            asked = self.job.request.max_tokens
            return "context" if asked is None or self.job.most < asked else "length"
        return "stop_sequence" if self.sequence.stopped_by is not None else reason

    def _token_probs(self, taken: Taken, count: int) -> TokenProbs:
        values = np.array(log_probs(taken.logits)[0].astype(mx.float32))
        best = np.argsort(-values, kind="stable")[:count].tolist()
        spelled = self.tokenizer.token_bytes
        top = tuple((spelled(token), float(values[token])) for token in best)
        return TokenProbs(taken.token, spelled(taken.token), float(values[taken.token]), top)
