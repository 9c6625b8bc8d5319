"""/openapi.json: what each path takes and with what it answers, made from the models of the bodies."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds4mlx import __version__
from ds4mlx.server.endpoints import endpoint
from ds4mlx.server.schemas_messages import CountRequest, MessagesRequest
from ds4mlx.server.schemas_openai import ChatRequest, CompletionRequest
from ds4mlx.server.schemas_responses import InputTokensRequest, ResponsesRequest

# The body of each path that takes one.
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": InputTokensRequest,
}
# Every status that a request can be answered with, and when.
STATUSES = {
    200: "It is answered.",
    400: "The body is not what it must be.",
    401: "The API key is missing or wrong.",
    403: "The Host or the Origin is not allowed here.",
    404: "There is no such path, model or answer.",
    405: "The path has no such method.",
    408: "The headers or the body came too late.",
    413: "The body is too large.",
    415: "The body is not plain JSON in UTF-8.",
    429: "The queue is full; Retry-After says when to come back.",
    503: "The server is stopping, or its memory would not do.",
    529: "The same, in Anthropic's protocol.",
}


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    template = "#/components/schemas/{model}"
    asked: list[Any] = [(model, "validation") for model in BODIES.values()]
    _, schemas = models_json_schema(asked, ref_template=template)
    answers = {str(status): {"description": about} for status, about in STATUSES.items()}
    paths = {
        path: {"post": {"requestBody": _body(model), "responses": answers}}
        for path, model in BODIES.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ds4mlx", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


@endpoint
async def openapi(request: Request) -> Response:
    """GET: the document."""
    return JSONResponse(description())


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}
