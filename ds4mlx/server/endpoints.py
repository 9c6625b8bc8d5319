"""How a function that may refuse becomes an endpoint of its protocol."""

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ds4mlx.server.errors import Dialect, Refusal, dialect_of, refusal_of
from ds4mlx.server.service import Service

Endpoint = Callable[[Request], Awaitable[Response]]
# What an answer to somebody who has left is called in logs; nobody reads it.
_LEFT = 499
# The fields that hold a prompt, where they are not `messages`.
_PROMPTS = {"/v1/completions": "prompt", "/v1/responses": "input"}


def service_of(request: Request) -> Service:
    """The one service of the application."""
    return request.app.state.service


def endpoint(function: Endpoint) -> Endpoint:
    """The function, whose every error is told in the dialect of the request."""

    @wraps(function)
    async def answer(request: Request) -> Response:
        try:
            return await function(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it has a shape here
            prompt = _PROMPTS.get(request.url.path, "messages")
            return _told(request, refusal_of(error, prompt=prompt))

    return answer


async def not_served(request: Request, error: Exception) -> Response:
    """The answer to a path or a method that there is not, or where serving a file failed."""
    if not isinstance(error, HTTPException):
        return _told(request, refusal_of(error))
    status, path = error.status_code, request.url.path[:200]
    messages = {404: f"there is no {path!r} here", 405: f"{path!r} has no {request.method[:20]}"}
    message = messages.get(status, error.detail)
    return _told(request, Refusal(status, message, headers=error.headers))


def gone() -> Response:
    """For a client that has left."""
    return Response(status_code=_LEFT)


def _told(request: Request, refusal: Refusal) -> Response:
    dialect: Dialect = dialect_of(request.url.path, request.headers)
    return dialect.response(refusal, getattr(request.state, "request_id", ""))
