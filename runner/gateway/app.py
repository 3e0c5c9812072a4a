"""The Falcon app of a listener: the routes of its APIs, and one shape for all errors.

Importing this costs 45 ms (Falcon), so the listener does it after it has opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import falcon
from falcon.asgi import App, Request, Response

from runner.errors import InvalidRequest
from runner.gateway import docs, system
from runner.gateway.admin import resources as admin
from runner.gateway.admin.control import Control
from runner.gateway.anthropic import resources as anthropic
from runner.gateway.anthropic.models import add_models
from runner.gateway.backend import Directory
from runner.gateway.decode import TOO_DEEP
from runner.gateway.dialects import in_dialect
from runner.gateway.errors import describe, error_body, error_kind, report
from runner.gateway.exchange import exchange_of
from runner.gateway.ollama import resources as ollama
from runner.gateway.openai import resources as openai
from runner.gateway.responses import resources as responses
from runner.plan.spec import ListenerSpec
from runner.telemetry import GatewayMetrics

AddRoutes = Callable[[App[Any, Any], str, Directory, GatewayMetrics], None]


def _add_openai(app: App[Any, Any], listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
    openai.add_routes(app, listener, directory, metrics)
    responses.add_routes(app, listener, directory, metrics)


APIS: Final[dict[str, AddRoutes]] = {
    "openai": _add_openai,
    "anthropic": anthropic.add_routes,
}
"""The APIs that a `servers` entry may name, beside admin, and ollama, which does more where admin is there too."""


def build_app(
    spec: ListenerSpec, directory: Directory, metrics: GatewayMetrics, control: Control | None = None
) -> App[Any, Any]:
    """An app with the APIs that `spec` names; that of `control` among them where it does. The manifest has checked that
    they exist."""
    app: App[Any, Any] = App()
    app.add_error_handler(Exception, _on_error)
    app.add_error_handler(falcon.HTTPError, _on_http_error)
    system.add_routes(app, spec.name, directory, metrics)
    docs.add_routes(app, spec)
    if "admin" in spec.apis:
        assert control is not None, "who serves the admin API can be administered"
        admin.add_routes(app, spec.name, control)
    for api in spec.apis:
        if api == "ollama":
            ollama.add_routes(app, spec.name, directory, metrics, control if "admin" in spec.apis else None)
        elif api != "admin":
            APIS[api](app, spec.name, directory, metrics)
    if "anthropic" in spec.apis:
        add_models(app, spec.name, directory, shared="openai" in spec.apis)
    return app


async def _on_http_error(request: Request, response: Response, error: falcon.HTTPError, params: object) -> None:
    """What Falcon raises itself. Its headers are kept: 405 has `Allow`."""
    status = error.status_code
    message = error.description or error.title or ""
    if status == 404 and not error.description:
        message = f"no such path: {request.method} {request.path}; /docs shows what there is"
    elif status == 405:
        message = f"{request.method} is not allowed on {request.path}"
        if allow := dict(error.headers or {}).get("Allow"):
            message += f"; use {allow.removesuffix(', OPTIONS')}"
    _respond(request, response, status, dict(error.headers or {}), error_body(message, error_kind(status)))


async def _on_error(request: Request, response: Response, error: Exception, params: object) -> None:
    exchange = exchange_of(request)
    if isinstance(error, RecursionError):  # of what the decoder took, on the way to an encoder
        error = InvalidRequest(TOO_DEEP, code="invalid_json")
    report(error, {"request_id": exchange.request_id, "route": exchange.route})
    _respond(request, response, *describe(error))


def _respond(request: Request, response: Response, status: int, headers: Mapping[str, str], body: bytes) -> None:
    response.status = status
    response.set_headers(dict(headers))
    response.content_type = falcon.MEDIA_JSON
    response.stream = None
    response.text = None
    response.data = in_dialect(request.path, body, status)
