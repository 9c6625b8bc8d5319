"""/v1/chat/completions: whole and streamed, and a way to end the reasoning of one that goes on."""

import time
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette.event import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds4mlx.chat.streaming import Content, Reasoning
from ds4mlx.engine.request import Ended, Failed, TokenProbs
from ds4mlx.server.answering import KeepAlive, Tokens, Turn, Whole, whole_unless_gone
from ds4mlx.server.chat_calls import CallPieces, whole_call
from ds4mlx.server.endpoints import endpoint, gone, service_of
from ds4mlx.server.errors import OPENAI, Refusal, refusal_of
from ds4mlx.server.logprobs import chat_logprobs
from ds4mlx.server.offered import Offered, of_chat
from ds4mlx.server.questions import question_of
from ds4mlx.server.schemas_openai import ChatRequest
from ds4mlx.server.sse import Stream, comment, event
from ds4mlx.server.usage import cause_of, figures_of, finish_of, usage_of


@endpoint
async def chat_completions(request: Request) -> Response:
    """POST: a conversation's next message."""
    service = service_of(request)
    body = await service.bodies.read(request, ChatRequest)
    offered = of_chat(body.tools or ())
    question = await run_in_threadpool(question_of, body, offered)
    turn = await service.ask(question, "chatcmpl-")
    model = body.model or service.name
    if body.stream:
        options = body.stream_options
        chunks = _Chunks(turn, model, offered)
        return Stream(chunks.events(bool(options and options.include_usage)), turn)
    whole = await whole_unless_gone(turn, request.receive)
    return JSONResponse(_completion(turn, model, whole, offered)) if whole else gone()


@endpoint
async def end_thinking(request: Request) -> Response:
    """POST: end the reasoning of a running answer of any protocol, by its id; it goes on to answer."""
    turn = service_of(request).turns.get(request.path_params["id"])
    if turn is None:
        raise Refusal(404, "no answer with this id is running", code="not_found")
    turn.end_thinking()
    return JSONResponse({"id": turn.id, "object": "chat.completion.thinking", "ended": True})


def _completion(turn: Turn, model: str, whole: Whole, offered: Offered) -> dict[str, Any]:
    message = whole.message
    calls = [whole_call(call, offered) for call in message["tool_calls"]]
    told: dict[str, Any] = {"role": "assistant", "content": message["content"], "refusal": None}
    if message.get("reasoning_content"):
        told["reasoning_content"] = message["reasoning_content"]
    if calls:
        told |= {"tool_calls": calls, "content": message["content"] or None}
    choice = {
        "index": 0,
        "message": told,
        "finish_reason": finish_of(whole.ended, bool(calls)),
        "stop_reason": cause_of(whole.ended),
        "logprobs": chat_logprobs(list(whole.tokens)),
    }
    return {
        "id": turn.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage_of(turn, whole.ended),
        "ds4mlx": figures_of(turn, whole.ended),
    }


class _Chunks:
    """A turn as the chunks of a stream."""

    def __init__(self, turn: Turn, model: str, offered: Offered):
        self._turn, self._calls = turn, CallPieces(offered)
        self._tokens: list[TokenProbs] = []  # those whose text is yet to come
        self._frame = {"id": turn.id, "object": "chat.completion.chunk"}
        self._frame |= {"created": int(time.time()), "model": model}

    async def events(self, include_usage: bool) -> AsyncIterator[ServerSentEvent]:
        """Every event of the stream; an error is the last."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for each in self._turn:
            if isinstance(each, KeepAlive):
                yield comment("the answer goes on")
            elif isinstance(each, Tokens):
                self._tokens += () if each.thinking else each.tokens
            elif isinstance(each, Failed):
                yield event(OPENAI.body(refusal_of(each.error, 500), ""))
                return
            elif isinstance(each, Ended):
                for last in self._end(each, include_usage):
                    yield last
            elif delta := self._delta(each):
                yield self._chunk(delta)

    def _delta(self, each: Any) -> dict[str, Any] | None:
        if isinstance(each, Reasoning):
            return {"reasoning_content": each.text}
        if isinstance(each, Content):
            return {"content": each.text}
        call = self._calls.add(each)
        return {"tool_calls": [call]} if call else None

    def _end(self, ended: Ended, include_usage: bool) -> list[ServerSentEvent]:
        finish = finish_of(ended, bool(self._turn.message["tool_calls"]))
        closing = self._chunk({}, finish_reason=finish, stop_reason=cause_of(ended))
        told = {
            "choices": [],
            "usage": usage_of(self._turn, ended),
            "ds4mlx": figures_of(self._turn, ended),
        }
        usage = [event(self._frame | told)] if include_usage else []
        return [closing, *usage, event("[DONE]")]

    def _chunk(self, delta: dict[str, Any], **more: Any) -> ServerSentEvent:
        choice = {"index": 0, "delta": delta, "finish_reason": None} | more
        if self._tokens and ("reasoning_content" not in delta):
            choice["logprobs"], self._tokens = chat_logprobs(self._tokens), []
        return event(self._frame | {"choices": [choice]})
