"""What all protocols share: from a question to its turn, and the turns that go on."""

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from ds4mlx.chat import encode_segments
from ds4mlx.chat.messages import read_turns
from ds4mlx.chat.segments import Prompt
from ds4mlx.chat.streaming import Completion
from ds4mlx.engine.request import Request
from ds4mlx.engine.rules import Rule
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.scheduler import Scheduler
from ds4mlx.server.answering import Turn
from ds4mlx.server.bodies import Bodies
from ds4mlx.server.cut_calls import CALLS_OPENING
from ds4mlx.server.kept_responses import KeptResponses
from ds4mlx.server.roles import settled


@dataclass(frozen=True)
class Question:
    """A conversation, as OpenAI's messages and tools, and how it is to be answered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: str = "none"
    thinking_budget: int | None = None
    max_tokens: int | None = None
    sampler: Sampler = field(default_factory=Sampler)
    stop: tuple[str, ...] = ()
    rule: Rule | None = None
    logprobs: int | None = None

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer, after its thought."""
        last = self.messages[-1] if self.messages else {}
        return last.get("role") == "assistant" and bool(last.get("prefix"))

    @property
    def rule_now(self) -> Rule | None:
        """The rule, with the beginning of the answer as a part of it."""
        if self.rule is None or not self.continues:
            return self.rule
        return self.rule.after(read_turns(self.messages[-1:])[0].text)


@dataclass(eq=False)
class Service:
    """One model behind all protocols. name: what the model is called."""

    scheduler: Scheduler
    name: str
    release: str
    bodies: Bodies
    created: int = field(default_factory=lambda: int(time.time()))
    turns: dict[str, Turn] = field(default_factory=dict)
    stopping: bool = False
    responses: KeptResponses = field(default_factory=KeptResponses)

    async def ask(self, question: Question, prefix: str) -> Turn:
        """The answer to a question, once its place is sure. prefix: of the answer's id.

        Raises what `Scheduler.submit` raises, and DataError for messages that cannot be read.
        """
        self.scheduler.check_place()  # before the work of writing the prompt
        prompt, rule = await run_in_threadpool(self._written, question)
        thinking = "none" if question.continues else question.thinking
        request = Request(
            prompt=prompt,
            max_tokens=question.max_tokens,
            sampler=question.sampler,
            stop=question.stop,
            until=CALLS_OPENING,
            thinking=thinking,
            thinking_budget=question.thinking_budget,
            rule=rule,
            logprobs=question.logprobs,
            label=prefix + secrets.token_hex(16),
        )
        return await self.submit(request, Completion(thinking))

    async def submit(self, request: Request, completion: Completion | None) -> Turn:
        """The answer to a request, whose label is its id."""
        answer = await self.scheduler.submit(request)
        turn = Turn(request.label, answer, completion, self.scheduler.remember, self._closed)
        self.turns[turn.id] = turn
        return turn

    async def count(self, question: Question) -> int:
        """How many tokens the question's prompt has, as its answer's usage would say."""
        return await self.scheduler.count(await run_in_threadpool(self.render, question))

    def render(self, question: Question) -> Prompt:
        """The prompt; calls that were sampled here are written as they were."""
        return encode_segments(
            settled(question.messages),
            question.thinking,
            question.tools or None,
            self.release,
            replay=self.scheduler.replay,
        )

    def _written(self, question: Question) -> tuple[Prompt, Rule | None]:
        """The prompt, by which the messages are checked, and then the rule."""
        return self.render(question), question.rule_now

    async def close(self, deadline: float) -> None:
        """Refuse what is new, end what goes on, save; within so many seconds."""
        self.stopping = True
        await asyncio.to_thread(self.scheduler.close, deadline)

    def _closed(self, turn: Turn) -> None:
        self.turns.pop(turn.id, None)
