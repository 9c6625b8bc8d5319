"""/health: how the server is, for people and for whoever watches it; it never waits."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds4mlx.server.endpoints import endpoint, service_of


@endpoint
async def health(request: Request) -> Response:
    """GET: 200, or 503 while the server is stopping."""
    service = service_of(request)
    status = service.scheduler.status()
    return JSONResponse(
        {
            "status": "stopping" if service.stopping else "ok",
            "model": service.name,
            "running": status.running,
            "waiting": status.waiting,
            "state_bytes": status.state_bytes,
            "store_bytes": status.store_bytes,
            "tokens_per_second": status.tokens_per_second,
            "context": service.scheduler.context,
        },
        503 if service.stopping else 200,
    )
