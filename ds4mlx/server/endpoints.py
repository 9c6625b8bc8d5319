"""How a function that may refuse becomes an endpoint of its protocol."""

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from ds4mlx.server.errors import Dialect, Refusal, dialect_of, refusal_of
from ds4mlx.server.service import Service

Endpoint = Callable[[Request], Awaitable[Response]]
# What the paths of the protocols begin with; clients put it before a path themselves, or do not.
_VERSION = "/v1"
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
    missing = f"there is no {path!r} here{_advice(request)}"
    messages = {404: missing, 405: f"{path!r} has no {request.method[:20]}"}
    message = messages.get(status, error.detail)
    return _told(request, Refusal(status, message, headers=error.headers))


def _advice(request: Request) -> str:
    """What to do about the base URL of a client that comes to a path which is nearly one of ours."""
    path = request.url.path
    if _is_served(request, f"{_VERSION}{path}"):
        return f": set the client's base URL to one that ends in {_VERSION}"
    if path.startswith(2 * _VERSION) and _is_served(request, path.removeprefix(_VERSION)):
        return f": leave {_VERSION} out of the client's base URL"
    return ""


def _is_served(request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] != Match.NONE for route in request.app.routes)


def gone() -> Response:
    """For a client that has left."""
    return Response(status_code=_LEFT)


def _told(request: Request, refusal: Refusal) -> Response:
    dialect: Dialect = dialect_of(request.url.path, request.headers)
    return dialect.response(refusal, getattr(request.state, "request_id", ""))
