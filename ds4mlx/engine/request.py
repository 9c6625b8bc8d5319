"""What is asked of the scheduler, the events that it answers with, and why it may refuse."""

from dataclasses import dataclass, field
from typing import Any

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine.sampling import Sampler
from ds4mlx.errors import DataError


class Busy(DataError):
    """The queue is full; `retry_after` whole seconds later there may be a place."""

    def __init__(self, waiting: int, retry_after: int):
        self.retry_after = retry_after
        super().__init__(
            f"{waiting} requests wait already and no more may; try again in {retry_after} s"
        )


class NoMemory(DataError):
    """The memory for states is too small for a request: `needed` and `available`, in bytes."""

    def __init__(self, tokens: int, needed: int, available: int):
        self.needed, self.available = needed, available
        super().__init__(
            f"a state of {tokens} tokens needs {needed / 1e9:.3f} GB of memory, and "
            f"{available / 1e9:.3f} GB are there for states"
        )


class TooLong(DataError):
    """The prompt has `tokens` tokens, and `most` are possible."""

    def __init__(self, tokens: int, most: int):
        self.tokens, self.most = tokens, most
        super().__init__(f"prompt is too long: {tokens} tokens > {most} maximum")


class Stopping(DataError):
    """The scheduler has been told to close."""

    def __init__(self) -> None:
        super().__init__("the server is stopping and takes no more requests")


@dataclass(frozen=True)
class Request:
    """One prompt, and how it is to be continued.

    max_tokens: None goes on as far as the context reaches, 0 only fills the cache. stop: texts that
    end the answer and do not appear in it. until: what begins the part of an answer in which they are
    not looked for, its calls. thinking: the effort that the prompt was written for.
    thinking_budget: most tokens of a thought. rule: what the answer must obey. logprobs: how many
    alternatives are told with every token; None tells no probabilities at all. label: for the log.
    """

    prompt: Prompt | list[int]
    max_tokens: int | None = None
    sampler: Sampler = field(default_factory=Sampler)
    stop: tuple[str, ...] = ()
    until: str = ""
    thinking: str = "none"
    thinking_budget: int | None = None
    rule: Any = None
    logprobs: int | None = None
    label: str = ""


@dataclass(frozen=True)
class TokenProbs:
    """A token that was drawn, its bytes, its log-probability, and the most probable ones."""

    token: int
    text_bytes: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Started:
    """The prompt is being read. Of its tokens `cached_tokens` were known; `source` says from where:
    "memory", "store", or "" for none."""

    prompt_tokens: int
    cached_tokens: int
    source: str


@dataclass(frozen=True)
class Piece:
    """Text, as much as can be shown now; `tokens` only where their probabilities were asked for.

    The texts of all pieces are the answer as it was sampled, its thought and </think> included.
    """

    text: str
    thinking: bool
    tokens: tuple[TokenProbs, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The answer is complete.

    reason: "stop" at the end token, "stop_sequence" (then `stop` says which), "length" after
    max_tokens, "context" where no more fit, "repetition". Speeds are in tokens per second.
    """

    reason: str
    stop: str | None
    completion_tokens: int
    reasoning_tokens: int
    prompt_tps: float
    generation_tps: float


@dataclass(frozen=True)
class Failed:
    """The answer ends here, incomplete, and why."""

    error: DataError


Event = Started | Piece | Ended | Failed


@dataclass(frozen=True)
class Status:
    """How the scheduler does. counters: of what has happened since the start, by name."""

    running: int = 0
    waiting: int = 0
    state_bytes: int = 0
    store_bytes: int = 0
    tokens_per_second: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
