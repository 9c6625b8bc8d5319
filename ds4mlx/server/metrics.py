"""/metrics, in Prometheus' text: what the scheduler counts, and the answers of each route."""

from collections.abc import Iterable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4mlx.engine.scheduler import Scheduler
from ds4mlx.server.endpoints import endpoint

# Each counter would come with the time it was made at.
disable_created_metrics()
_GAUGES = {
    "running": "Sequences that are read in or decoded now.",
    "waiting": "Requests in the queue.",
    "state_bytes": "Bytes of all states in memory.",
    "store_bytes": "Bytes of the KV store on disk.",
    "tokens_per_second": "Tokens decoded a second, of all sequences together.",
}


class Metrics:
    """The figures of one application."""

    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()
        self.registry.register(_Scheduled(scheduler))
        self.answers = Counter(
            "ds4mlx_http_answers", "HTTP answers.", ["route", "status"], registry=self.registry
        )


class Counted:
    """Middleware: counts answers by route, of which there are few, and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Iterable[str]):
        self.app, self.metrics, self.routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in self.routes else "other"
                self.metrics.answers.labels(route, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


class _Scheduled(Collector):
    """Reads the scheduler's figures when they are asked for."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        status = self._scheduler.status()
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"ds4mlx_{name}", about, getattr(status, name))
        for name, count in status.counters.items():
            yield CounterMetricFamily(f"ds4mlx_{name}", f"{name} since the start.", count)


@endpoint
async def metrics(request: Request) -> Response:
    """GET: all figures."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
