"""Anthropic's Messages: `/v1/messages`, whole and streamed, and `/v1/messages/count_tokens`."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ds4mlx.server.constraints import rule_of
from ds4mlx.server.endpoints import endpoint, gone, service_of
from ds4mlx.server.messages_events import MessageWriter
from ds4mlx.server.messages_request import choice_of, messages_of, schema_of, thinking_of
from ds4mlx.server.offered import of_messages
from ds4mlx.server.questions import sampler_of
from ds4mlx.server.schemas_messages import CountRequest, MessagesRequest
from ds4mlx.server.service import Question
from ds4mlx.server.sse import Stream
from ds4mlx.server.writing import is_written, streamed


def question_of(body: MessagesRequest) -> Question:
    """The question. Raises DataError or Refusal for what is wrong in it."""
    offered = of_messages(body.tools or [])
    thinking, budget = thinking_of(body)
    single = bool(body.tool_choice and body.tool_choice.disable_parallel_tool_use)
    choice = choice_of(body, offered)
    return Question(
        messages=messages_of(body),
        tools=offered.functions,
        thinking=thinking,
        thinking_budget=budget,
        max_tokens=body.max_tokens,
        sampler=sampler_of(body),
        stop=tuple(body.stop_sequences or ()),
        rule=rule_of(offered.functions, choice, not single, schema_of(body)),
    )


@endpoint
async def messages(request: Request) -> Response:
    """POST: a conversation's next message."""
    service = service_of(request)
    body = await service.bodies.read(request, MessagesRequest)
    question = await run_in_threadpool(question_of, body)
    turn = await service.ask(question, "msg_")
    shows = not (body.thinking and body.thinking.display == "omitted")
    writer = MessageWriter(turn.id, body.model or service.name, request.state.request_id, shows)
    if body.stream:
        return Stream(streamed(turn, writer, []), turn)
    if await is_written(turn, writer, request.receive):
        return JSONResponse(writer.message)
    return gone()


@endpoint
async def count_tokens(request: Request) -> Response:
    """POST: how many tokens of input a message would be said to have."""
    service = service_of(request)
    body = await service.bodies.read(request, CountRequest)
    question = await run_in_threadpool(_counted, body)
    return JSONResponse({"input_tokens": await service.count(question)})


def _counted(body: CountRequest) -> Question:
    tools = of_messages(body.tools or []).functions
    return Question(messages=messages_of(body), tools=tools, thinking=thinking_of(body)[0])


ROUTES = [
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
