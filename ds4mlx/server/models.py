"""/v1/models: the one model, in the dialect of whoever asks."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds4mlx.server.endpoints import endpoint, service_of
from ds4mlx.server.errors import ANTHROPIC, Refusal, dialect_of
from ds4mlx.server.service import Service


@endpoint
async def models(request: Request) -> Response:
    """GET: the list."""
    model = _model(request)
    if dialect_of(request.url.path, request.headers) is ANTHROPIC:
        ends = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}
        return JSONResponse({"data": [model]} | ends)
    return JSONResponse({"object": "list", "data": [model]})


@endpoint
async def model(request: Request) -> Response:
    """GET: the model by its name; there is no other."""
    name = request.path_params["id"]
    if name != service_of(request).name:
        raise Refusal(404, f"the model {name[:200]!r} does not exist", code="model_not_found")
    return JSONResponse(_model(request))


def _model(request: Request) -> dict[str, Any]:
    service = service_of(request)
    if dialect_of(request.url.path, request.headers) is ANTHROPIC:
        return _anthropic(service)
    context = service.scheduler.context
    named = {"id": service.name, "object": "model", "created": service.created}
    sizes = {"context_window": context, "context_length": context, "max_model_len": context}
    return named | {"owned_by": "ds4mlx"} | sizes


def _anthropic(service: Service) -> dict[str, Any]:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
    return {
        "type": "model",
        "id": service.name,
        "display_name": service.name,
        "created_at": made,
        "max_input_tokens": service.scheduler.context,
    }
