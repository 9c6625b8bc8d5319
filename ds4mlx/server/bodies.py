"""The JSON of a request, or a refusal: bytes, time, depth and spelling are all limited."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ds4mlx.server.errors import Refusal
from ds4mlx.server.safety import Limits

Model = TypeVar("Model", bound=BaseModel)
# What is still read of a body that is too large, so that its sender comes to hear so.
_PATIENCE = 5.0


class Bodies:
    """Reads bodies within the limits; two at a time become objects, which takes the most memory."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._parsing = asyncio.Semaphore(2)

    async def read(self, request: Request, kind: type[Model]) -> Model:
        """The body, checked. Raises Refusal, or pydantic's ValidationError, for what is wrong."""
        raw = await _read(request, self.limits)
        async with self._parsing:
            return await run_in_threadpool(lambda: kind.model_validate(parse(raw, self.limits)))


def parse(raw: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object. Half surrogate pairs, which clients make by cutting texts, become U+FFFD."""
    if raw.count(b"[") + raw.count(b"{") > limits.values:
        raise Refusal(400, f"the body opens more than {limits.values} lists and objects")
    try:
        value = json.loads(raw.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error.msg} at {error.pos}") from None
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError as error:  # a number of thousands of digits, NaN, Infinity
        raise Refusal(400, f"the body is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    _check_depth(value, limits)
    return _mended(value) if b"\\ud" in raw or b"\\uD" in raw else value


async def _read(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "")
    raw, size = bytearray(), 0
    is_over = declared.isdigit() and int(declared) > limits.body
    try:
        async with asyncio.timeout(_PATIENCE if is_over else limits.body_seconds) as deadline:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body and not is_over:
                    is_over = True
                    raw.clear()
                    deadline.reschedule(asyncio.get_running_loop().time() + _PATIENCE)
                if is_over and size > 4 * limits.body:
                    break
                if not is_over:
                    raw += chunk
    except TimeoutError:
        if not is_over:
            message = f"the body did not come within {limits.body_seconds:g} seconds"
            raise Refusal(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(400, "the client left before its body had come") from None
    if is_over:
        message = f"the body is larger than {limits.body} bytes"
        raise Refusal(413, message, headers={"Connection": "close"})
    return bytes(raw)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any, limits: Limits) -> None:
    level = [value]
    for _ in range(limits.depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep(limits)


def _too_deep(limits: Limits) -> Refusal:
    return Refusal(400, f"the body nests deeper than {limits.depth} levels")


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(inner) for inner in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(inner) for key, inner in value.items()}
    return value
