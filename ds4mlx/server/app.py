"""The application: routes, and what every request passes before it comes to one."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ds4mlx.engine.rules import prepare
from ds4mlx.engine.scheduler import Scheduler
from ds4mlx.model.model import Model
from ds4mlx.server.bodies import Bodies
from ds4mlx.server.chat_completions import chat_completions, end_thinking
from ds4mlx.server.completions import completions
from ds4mlx.server.endpoints import not_served
from ds4mlx.server.health import health
from ds4mlx.server.messages import ROUTES as MESSAGES
from ds4mlx.server.metrics import Counted, Metrics, metrics
from ds4mlx.server.models import model as one_model
from ds4mlx.server.models import models
from ds4mlx.server.openapi import openapi
from ds4mlx.server.responses import ROUTES as RESPONSES
from ds4mlx.server.safety import ANY, Doors, Guard, KeyGuard, Limits
from ds4mlx.server.service import Service
from ds4mlx.store import KVStore
from ds4mlx.text.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "page"
# Seconds in which everything is to be saved when the server stops.
CLOSING = 35.0
ROUTES: list[BaseRoute] = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/chat/completions/{id}/end_thinking", end_thinking, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    *MESSAGES,
    *RESPONSES,
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{id:path}", one_model, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/openapi.json", openapi, methods=["GET"]),
]


def create_app(
    model: Model,
    tokenizer: Tokenizer,
    *,
    name: str = "ds4mlx",
    store: KVStore | None = None,
    context: int | None = None,
    max_batch: int = 8,
    max_queue: int = 32,
    aligned: bool = False,
    reuse: bool = True,
    memory: int | None = None,
    key: str | None = None,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    limits: Limits | None = None,
) -> Starlette:
    """An application that serves one model under a name.

    store to memory: see `Scheduler`. key: what clients must show. hosts: names of this server beside
    loopback's. origins: of web pages that may ask, or `*`. Its lifespan starts the scheduler and
    closes it. Raises DataError for options out of range.
    """
    scheduler = Scheduler(
        model,
        tokenizer,
        store=store,
        context=context,
        max_batch=max_batch,
        max_queue=max_queue,
        aligned=aligned,
        reuse=reuse,
        memory=memory,
    )
    service = Service(scheduler, name, model.args.release, Bodies(limits or Limits()))
    if tokenizer.vocab_size:
        prepare(tokenizer)  # or the first answer with a rule would stop all others for a second
    figures = Metrics(scheduler)
    app = Starlette(
        routes=ROUTES,
        middleware=_middleware(Doors(key, hosts, origins), figures),
        exception_handlers={HTTPException: not_served, Exception: not_served},
        lifespan=_lifespan,
    )
    # Not a route, which would take every method of every path from those that have only some.
    app.router.default = _Page(directory=PAGE, html=True)
    app.router.redirect_slashes = False
    app.state.service, app.state.metrics = service, figures
    return app


class _Page(StaticFiles):
    """The page's files; what is none of them is not there, whatever was to be done with it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, or HTTPException: 404 where there is none, 405 for what no file takes."""
        if scope["method"] not in ("GET", "HEAD"):
            await super().get_response(path, {**scope, "method": "GET"})
        return await super().get_response(path, scope)


def _middleware(doors: Doors, figures: Metrics) -> list[Middleware]:
    paths = [route.path for route in ROUTES if isinstance(route, Route)]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(doors.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=[ANY],
        expose_headers=["x-request-id", "request-id", "Retry-After"],
        allow_private_network=True,
    )
    return [
        Middleware(Counted, metrics=figures, routes=paths),
        Middleware(Guard, doors=doors),
        *([cors] if doors.origins else []),
        Middleware(KeyGuard, doors=doors),
    ]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.scheduler.start()
    yield
    if not service.stopping:
        await service.close(CLOSING)
