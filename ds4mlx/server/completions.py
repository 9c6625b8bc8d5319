"""/v1/completions: a text that goes on, without the chat encoding."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette.event import ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ds4mlx.chat.segments import Prompt, markup, outside
from ds4mlx.chat.streaming import Content
from ds4mlx.chat.tokens import BOS
from ds4mlx.engine.request import Ended, Failed, Request, TokenProbs
from ds4mlx.server.answering import KeepAlive, Tokens, Turn, whole_unless_gone
from ds4mlx.server.endpoints import endpoint, gone, service_of
from ds4mlx.server.errors import OPENAI, Refusal, refusal_of
from ds4mlx.server.logprobs import TextLogprobs
from ds4mlx.server.questions import check_choices, sampler_of
from ds4mlx.server.schemas_openai import CompletionRequest
from ds4mlx.server.sse import Stream, comment, event
from ds4mlx.server.usage import cause_of, figures_of, finish_of, usage_of

# What OpenAI's service takes where a request does not say.
_USUAL_TOKENS = 16


@endpoint
async def completions(request: HttpRequest) -> Response:
    """POST: what follows a text, or token ids."""
    service = service_of(request)
    body = await service.bodies.read(request, CompletionRequest)
    asked, echo = _request_of(body), _echo(body)
    turn = await service.submit(asked, None)
    text = _Text(turn, body.model or service.name, echo)
    if body.stream:
        options = body.stream_options
        return Stream(text.events(bool(options and options.include_usage)), turn)
    whole = await whole_unless_gone(turn, request.receive)
    if whole is None:
        return gone()
    last = text.frame(echo + whole.message["content"], list(whole.tokens), whole.ended)
    return JSONResponse(last | text.figures(whole.ended))


def _request_of(body: CompletionRequest) -> Request:
    check_choices(body)
    if body.suffix:
        raise Refusal(400, "suffix is not supported", param="suffix")
    if body.best_of not in (None, 1):
        raise Refusal(400, f"best_of must be 1, not {body.best_of}", param="best_of")
    return Request(
        prompt=_prompt(body),
        max_tokens=_USUAL_TOKENS if body.max_tokens is None else body.max_tokens,
        sampler=sampler_of(body),
        stop=body.stops,
        logprobs=body.logprobs,
        label=f"cmpl-{secrets.token_hex(16)}",
    )


def _prompt(body: CompletionRequest) -> Prompt | list[int]:
    """Token ids as they are; of a text, no part becomes a special token."""
    given = _single(body)
    if isinstance(given, str):
        return Prompt([markup(BOS), outside(given)])
    return given


def _single(body: CompletionRequest) -> str | list[int]:
    given: Any = body.prompt
    if isinstance(given, list) and given and not isinstance(given[0], int):
        if len(given) > 1:
            raise Refusal(400, "several prompts in one request are not supported", param="prompt")
        given = given[0]
    if given == []:
        raise Refusal(400, "the prompt is empty", param="prompt")
    return given


def _echo(body: CompletionRequest) -> str:
    given = _single(body)
    if not body.echo:
        return ""
    if not isinstance(given, str):
        raise Refusal(400, "echo needs a prompt that is text", param="echo")
    if body.logprobs is not None:
        message = "logprobs are of the answer only, and are not supported together with echo"
        raise Refusal(400, message, param="logprobs")
    return given


class _Text:
    """A turn as text, whole or in chunks of the same shape."""

    def __init__(self, turn: Turn, model: str, echo: str):
        self._turn, self._echo = turn, echo
        self._head = {"id": turn.id, "object": "text_completion"}
        self._head |= {"created": int(time.time()), "model": model}
        self._logprobs = TextLogprobs()

    def frame(
        self, text: str, tokens: list[TokenProbs], ended: Ended | None = None
    ) -> dict[str, Any]:
        """A chunk, or the whole answer but for its usage."""
        choice = {
            "index": 0,
            "text": text,
            "finish_reason": ended and finish_of(ended, False),
            "stop_reason": ended and cause_of(ended),
            "logprobs": self._logprobs.of(tokens),
        }
        return self._head | {"choices": [choice]}

    def figures(self, ended: Ended) -> dict[str, Any]:
        """What the answer took."""
        return {"usage": usage_of(self._turn, ended), "ds4mlx": figures_of(self._turn, ended)}

    async def events(self, include_usage: bool) -> AsyncIterator[ServerSentEvent]:
        """Every event of the stream; an error is the last."""
        tokens: list[TokenProbs] = []
        if self._echo:
            yield event(self.frame(self._echo, []))
        async for each in self._turn:
            if isinstance(each, KeepAlive):
                yield comment("the answer goes on")
            elif isinstance(each, Tokens):
                tokens += each.tokens
            elif isinstance(each, Content):
                yield event(self.frame(each.text, tokens))
                tokens = []
            elif isinstance(each, Failed):
                yield event(OPENAI.body(refusal_of(each.error, 500), ""))
                return
            elif isinstance(each, Ended):
                yield event(self.frame("", tokens, each))
                if include_usage:
                    yield event(self._head | {"choices": []} | self.figures(each))
                yield event("[DONE]")
