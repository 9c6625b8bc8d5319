"""OpenAI's Responses: made, streamed, kept for a while, asked for again, and forgotten."""

from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ds4mlx.server.constraints import rule_of
from ds4mlx.server.endpoints import endpoint, gone, service_of
from ds4mlx.server.errors import Refusal
from ds4mlx.server.kept_responses import Kept, KeptResponses
from ds4mlx.server.offered import Offered, of_responses
from ds4mlx.server.questions import check_choices, sampler_of
from ds4mlx.server.response_object import listed_items, response_of
from ds4mlx.server.responses_events import ResponseWriter
from ds4mlx.server.responses_request import (
    choice_of,
    format_of,
    items_of,
    messages_of,
    thinking_of,
    tools_of,
)
from ds4mlx.server.schemas_responses import InputTokensRequest, ResponsesRequest
from ds4mlx.server.service import Question
from ds4mlx.server.sse import Stream
from ds4mlx.server.writing import is_written, streamed

_REFUSED = {
    "background": "a response is not made in the background here",
    "conversation": "conversations are not kept here; previous_response_id goes on from a response",
    "prompt": "prompts are not kept here",
}


@endpoint
async def responses(request: Request) -> Response:
    """POST: the next response of a conversation."""
    service = service_of(request)
    body = await service.bodies.read(request, ResponsesRequest)
    asked = Asked(body, service.responses)
    question = await run_in_threadpool(asked.question, body)
    turn = await service.ask(question, "resp_")
    writer = asked.writer(body, response_of(turn.id, body, service.name))

    def keep() -> None:
        if body.store is not False:
            service.responses.add(writer.whole, asked.own, asked.previous)

    if body.stream:
        return Stream(streamed(turn, writer, writer.begin(), keep), turn)
    if await is_written(turn, writer, request.receive):
        keep()
        return JSONResponse(writer.whole)
    return gone()


@endpoint
async def input_tokens(request: Request) -> Response:
    """POST: how many tokens of input a response would be said to have."""
    service = service_of(request)
    body = await service.bodies.read(request, InputTokensRequest)
    asked = Asked(body, service.responses)
    count = await service.count(await run_in_threadpool(asked.prompt, body))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


@endpoint
async def one_response(request: Request) -> Response:
    """GET: a response that is kept. DELETE: forget it."""
    kept = service_of(request).responses
    found = _found(kept, request.path_params["id"])
    if request.method != "DELETE":
        return JSONResponse(found.response)
    kept.remove(found.response["id"])
    return JSONResponse({"id": found.response["id"], "object": "response", "deleted": True})


@endpoint
async def input_items(request: Request) -> Response:
    """GET: what a response that is kept was made from, the latest first unless told."""
    found = _found(service_of(request).responses, request.path_params["id"])
    return JSONResponse(listed_items(found, request.query_params))


class Asked:
    """A request with what it goes on from."""

    def __init__(self, body: InputTokensRequest, kept: KeptResponses):
        for name, reason in _REFUSED.items():
            if getattr(body, name, None):
                raise Refusal(400, reason, code="unsupported_parameter", param=name)
        self.previous: Kept | None = None
        if body.previous_response_id is not None:
            self.previous = kept.get(body.previous_response_id)
            if self.previous is None:
                raise _missing(body.previous_response_id, 400, "previous_response_not_found")
        self.own = items_of(body, kept.item)
        before: Sequence[Any] = self.previous.items if self.previous else ()
        self.items = [*before, *self.own]
        if not self.items:
            raise Refusal(
                400, "the input is empty", code="missing_required_parameter", param="input"
            )
        self.offered: Offered = of_responses(tools_of(body, self.items))

    def prompt(self, body: InputTokensRequest) -> Question:
        """The question as far as it becomes the prompt."""
        messages = messages_of(body.instructions, self.items)
        return Question(messages, self.offered.functions, thinking_of(body))

    def question(self, body: ResponsesRequest) -> Question:
        """The question. Raises DataError or Refusal for what is wrong in it."""
        check_choices(body)
        functions, choice = self.offered.functions, choice_of(body, self.offered)
        return Question(
            messages=messages_of(body.instructions, self.items),
            tools=functions,
            thinking=thinking_of(body),
            thinking_budget=body.reasoning and body.reasoning.max_tokens,
            max_tokens=body.max_output_tokens,
            sampler=sampler_of(body),
            stop=body.stops,
            rule=rule_of(functions, choice, body.parallel_tool_calls, format_of(body)),
            logprobs=(body.top_logprobs or 0) if body.tells_logprobs else None,
        )

    def writer(self, body: ResponsesRequest, response: dict[str, Any]) -> ResponseWriter:
        """What tells the answer."""
        seals = "reasoning.encrypted_content" in (body.include or ())
        return ResponseWriter(response, self.offered, seals, body.tells_logprobs)


def _found(kept: KeptResponses, response_id: str) -> Kept:
    found = kept.get(response_id)
    if found is None:
        raise _missing(response_id, 404, "not_found")
    return found


def _missing(response_id: str, status: int, code: str) -> Refusal:
    message = f"there is no response with the id {response_id[:80]!r}; it may have been forgotten"
    param = "previous_response_id" if status == 400 else None
    return Refusal(status, message, code=code, param=param)


ROUTES = [
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/responses/input_tokens", input_tokens, methods=["POST"]),
    Route("/v1/responses/{id}", one_response, methods=["GET", "DELETE"]),
    Route("/v1/responses/{id}/input_items", input_items, methods=["GET"]),
]
