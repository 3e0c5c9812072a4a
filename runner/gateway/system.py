"""What every listener answers, whatever its APIs: `/ready` and `/metrics` (`/health` is the guard's)."""

from __future__ import annotations

from typing import Any

import msgspec
from falcon.asgi import App, Request, Response

from runner.gateway.backend import Directory
from runner.gateway.exchange import exchange_of
from runner.gateway.sockets import connections as open_connections
from runner.telemetry import GatewayMetrics

_encode = msgspec.json.Encoder().encode


def add_routes(app: App[Any, Any], listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
    """Adds them to a listener's app."""
    app.add_route("/ready", Ready(listener, directory))
    app.add_route("/metrics", Metrics(listener, directory, metrics))


class Ready:
    """Whether each of the listener's models has generated."""

    def __init__(self, listener: str, directory: Directory) -> None:
        self._listener = listener
        self._directory = directory

    async def on_get(self, request: Request, response: Response) -> None:
        """200 when all have; else 503, with those that have not."""
        exchange_of(request).route = "/ready"
        models = {deployment.name: deployment.ready for deployment in self._directory.deployments(self._listener)}
        waiting = [name for name, ready in models.items() if not ready]
        response.content_type = "application/json"
        if waiting:
            response.status = 503
            response.set_header("retry-after", "1")
        response.data = _encode({"status": "loading" if waiting else "ready", "models": models, "not_ready": waiting})


class Metrics:
    """Prometheus text."""

    def __init__(self, listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
        self._listener = listener
        self._directory = directory
        self._metrics = metrics

    async def on_get(self, request: Request, response: Response) -> None:
        """The gateway's counters, and the engines' own."""
        exchange_of(request).route = "/metrics"
        # prometheus_client costs 40 ms and 4 MB: for those that scrape, at their first time.
        from runner.gateway import metrics  # noqa: PLC0415

        engines = self._directory.deployments(self._listener)
        connections = sum(1 for _ in open_connections(int(request.scope["server"][1])))
        response.content_type = metrics.CONTENT_TYPE
        response.data = metrics.render(self._metrics, engines, self._listener, connections)
