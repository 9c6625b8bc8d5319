"""What is refused, and why, in the shape that each protocol gives its errors.

A `Refusal` knows no protocol; a `Dialect` makes a body of it. Tracebacks and texts of prompts stay
out of both.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from ds4mlx.engine.machine import OutOfMemory
from ds4mlx.engine.request import Busy, NoMemory, Stopping, TooLong
from ds4mlx.engine.rules import RuleError
from ds4mlx.errors import DataError

LOG = logging.getLogger("ds4mlx")
# Seconds after which to come back, where nothing says when there will be room.
RETRY = 5
# Pydantic's name of one of several types that a field may have.
_FORM = re.compile(r"(constrained-)?str|(list|dict)\[.*\]")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """An answer that is an error: status, one sentence, and what clients read beside it.

    code, param: OpenAI's fields. retry_after: whole seconds. headers: more of the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)


@dataclass(frozen=True)
class Dialect:
    """How a protocol says errors. body: of a refusal and a request's id; status: the one it uses."""

    body: Callable[[Refusal, str], dict[str, Any]]
    status: Callable[[Refusal], int]
    id_header: str

    def response(self, refusal: Refusal, request_id: str = "") -> JSONResponse:
        """The whole answer."""
        body = self.body(refusal, request_id)
        return JSONResponse(body, self.status(refusal), refusal.headers)


def refusal_of(error: BaseException, status: int = 400, prompt: str = "messages") -> Refusal:
    """What to tell a client about an error. status: that of a DataError of no special kind.

    Before an answer those are the client's fault, 400; in the middle of one they are ours, 500.
    prompt: the field of the request that holds its prompt.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, TooLong):
        return Refusal(400, _overflow(error), code="context_length_exceeded", param=prompt)
    if isinstance(error, Busy):
        wait = max(1, round(error.retry_after))
        return Refusal(429, str(error), code="rate_limit_exceeded", retry_after=wait)
    if isinstance(error, NoMemory | OutOfMemory | Stopping):
        return Refusal(503, str(error), code="overloaded", retry_after=RETRY)
    if isinstance(error, RuleError):
        return Refusal(400, str(error), code="invalid_value")
    if isinstance(error, DataError):
        return Refusal(status, str(error), code="invalid_value" if status == 400 else None)
    LOG.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed at this request; its log says why")


def _overflow(error: TooLong) -> str:
    """In the words that clients look for to start compacting."""
    return (
        f"prompt is too long: {error.tokens} tokens > {error.most} maximum; "
        f"this model's maximum context length is {error.most} tokens"
    )


def _of_validation(error: ValidationError) -> Refusal:
    """What is wrong with the first field. Where it may have several forms, pydantic says of each
    why it is none; the one that was meant is that in which the fault lies deepest."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    field = [fault for fault in errors if fault["loc"][:1] == errors[0]["loc"][:1]]
    deepest = max(map(_depth, field))
    meant = [fault for fault in field if _depth(fault) == deepest]
    first, *others = dict.fromkeys(fault["msg"] for fault in meant)
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    place = ".".join(_place(meant[0]))
    message = f"{place}: {message}" if place else message
    return Refusal(400, message, code="invalid_type", param=place or None)


def _depth(fault: Any) -> tuple[int, bool]:
    """How deep it lies; of those at one place, a value of the right type that will not do is deeper."""
    return len(_place(fault)), not fault["type"].endswith("_type")


def _place(fault: Any) -> list[str]:
    """Keys and indices on the way to it, without pydantic's names of forms."""
    return [str(part) for part in fault["loc"] if not _FORM.fullmatch(str(part))]


def _openai_body(refusal: Refusal, request_id: str) -> dict[str, Any]:
    kind = _TYPES.get(refusal.status)
    kind = kind or ("server_error" if refusal.status >= 500 else "invalid_request_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.param}
    return {"error": error | {"code": refusal.code}}


def _anthropic_body(refusal: Refusal, request_id: str) -> dict[str, Any]:
    types = _TYPES | {413: "request_too_large", 503: "overloaded_error"}
    kind = types.get(refusal.status)
    kind = kind or ("api_error" if refusal.status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": refusal.message}
    return {"type": "error", "error": error, "request_id": request_id}


def _anthropic_status(refusal: Refusal) -> int:
    return 529 if refusal.status == 503 else refusal.status


OPENAI = Dialect(_openai_body, lambda refusal: refusal.status, "x-request-id")
ANTHROPIC = Dialect(_anthropic_body, _anthropic_status, "request-id")


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """The protocol of a request, by its path or by the header that Anthropic's clients send."""
    messages = path.rstrip("/") == "/v1/messages" or path.startswith("/v1/messages/")
    return ANTHROPIC if messages or "anthropic-version" in headers else OPENAI
