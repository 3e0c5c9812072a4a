"""The OpenAPI document of a listener, made from the very types that decode its requests.

python -m runner.gateway.openapi        the document with every API, as schemas/openapi.json has it
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from runner.gateway.admin import wire as admin
from runner.gateway.anthropic import wire as anthropic
from runner.gateway.ollama import wire as ollama
from runner.gateway.openai import wire as openai
from runner.gateway.policy import OPEN_PATHS
from runner.gateway.responses import wire as responses

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_LINES: Final = "application/x-ndjson"
_PARAMETER: Final = re.compile(r"{(\w+)(?::\w+)?}")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `body` is the type that decodes it, `stream` how an answer comes in pieces, `query` its
    parameters as JSON Schema, those without a default required.

    `status` are the answers other than 200 that it may give.
    """

    method: str
    path: str
    summary: str
    body: Any = None
    stream: str = ""
    answer: str = _JSON
    status: tuple[int, ...] = ()
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_ASKING: Final = (400, 404, 413, 415, 500, 503)
_CHANGING: Final = (400, 404, 409, 413, 415, 422, 500, 503)
_ENGINES: Final = ("get", "/ready", "Whether every model of this server has generated a token")

OPERATIONS: Final[Mapping[str, tuple[Operation, ...]]] = {
    "": (
        Operation("get", "/health", "Whether the server is up"),
        Operation(*_ENGINES, status=(503,)),
        Operation("get", "/metrics", "Counters, as Prometheus reads them", answer="text/plain"),
        Operation("get", "/openapi.json", "This document"),
        Operation("get", "/docs", "This document, to be read", answer="text/html"),
    ),
    "openai": (
        Operation("post", "/v1/chat/completions", "Answer a conversation", openai.ChatRequest, _EVENTS, status=_ASKING),
        Operation("post", "/v1/completions", "Go on from a prompt", openai.CompletionRequest, _EVENTS, status=_ASKING),
        Operation("get", "/v1/models", "The models, their aliases and adapters"),
        Operation("get", "/v1/models/{model_id}", "One model", status=(404,)),
        Operation("post", "/v1/responses", "Answer an input", responses.ResponsesRequest, _EVENTS, status=_ASKING),
        Operation("post", "/v1/responses/input_tokens", "Count an input", responses.ResponsesRequest, status=_ASKING),
        Operation("get", "/v1/responses/{response_id}", "An answer that was kept", status=(404,)),
        Operation("delete", "/v1/responses/{response_id}", "Forget an answer", status=(404,)),
        Operation("get", "/v1/responses/{response_id}/input_items", "What a response answered", status=(404,)),
    ),
    "anthropic": (
        Operation("post", "/v1/messages", "Answer a conversation", anthropic.MessagesRequest, _EVENTS, status=_ASKING),
        Operation("post", "/v1/messages/count_tokens", "Count a prompt", anthropic.CountRequest, status=_ASKING),
        Operation("get", "/v1/models", "The models, their aliases and adapters"),
        Operation("get", "/v1/models/{model_id}", "One model", status=(404,)),
    ),
    "ollama": (
        Operation("post", "/api/chat", "Answer a conversation", ollama.ChatRequest, _LINES, status=_ASKING),
        Operation("post", "/api/generate", "Answer a prompt", ollama.GenerateRequest, _LINES, status=_ASKING),
        Operation("get", "/api/tags", "The models"),
        Operation("get", "/api/ps", "The models that are loaded"),
        Operation("get", "/api/version", "The version of the API"),
        Operation("post", "/api/show", "One model", ollama.ShowRequest, status=(400, 404, 413)),
        Operation(
            "post", "/api/pull", "Fetch a model", ollama.PullRequest, _LINES, status=(400, 403, 404, 413, 422, 502, 503)
        ),
        Operation("post", "/api/create", "Make sure of a model", ollama.CreateRequest, _LINES, status=(400, 413, 501)),
    ),
    "admin": (
        Operation("get", "/v1/status", "What is up, and how it stands"),
        Operation("get", "/v1/models/available", "What is in the hub's cache and in folders that manifests use"),
        Operation(
            "get",
            "/v1/models/search",
            "What the hub has for some words, and whether it would fit here",
            status=(400, 502, 503),
            query=admin.SEARCH,
        ),
        Operation("post", "/v1/plan", "What apply would do", admin.Plan, status=_CHANGING),
        Operation("post", "/v1/apply", "Make the manifest live, as its files are now", admin.Apply, status=_CHANGING),
        Operation("post", "/v1/models/load", "Serve a model", admin.LoadModel, status=_CHANGING),
        Operation("post", "/v1/models/unload", "Stop a model", admin.UnloadModel, status=_CHANGING),
        Operation("post", "/v1/adapters/load", "Serve an adapter", admin.LoadAdapter, status=_CHANGING),
        Operation("post", "/v1/adapters/unload", "Drop an adapter", admin.UnloadAdapter, status=_CHANGING),
    ),
}
"""By API; under "" what every server has."""


def document(apis: Iterable[str], *, locked: bool = False) -> dict[str, Any]:
    """OpenAPI 3.1, for a server with these APIs. `locked`: it asks for a key."""
    chosen = [(api, operation) for api in ("", *apis) for operation in OPERATIONS.get(api, ())]
    bodies = {operation.body: None for _, operation in chosen if operation.body is not None}
    references, components = msgspec.json.schema_components(list(bodies), ref_template="#/components/schemas/{name}")
    schemas = dict(zip(bodies, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for api, operation in chosen:
        path = paths.setdefault(operation.path, {})
        path[operation.method] = _operation(api, operation, schemas.get(operation.body), locked=locked)
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-run",
            "version": "1",
            "description": "Local MLX models, behind the APIs that their clients know.",
        },
        "paths": paths,
        "components": {"schemas": {**_undented(components), "Error": _ERROR}},
    }
    if locked:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made


def _undented(schema: Any) -> Any:
    """Descriptions, which are docstrings, as msgspec has them from 0.23 on: without their indentation."""
    if isinstance(schema, dict):
        return {
            name: inspect.cleandoc(value) if name == "description" and isinstance(value, str) else _undented(value)
            for name, value in schema.items()
        }
    return [_undented(part) for part in schema] if isinstance(schema, list) else schema


_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": ["object", "string"], "description": "In the shape of the API that was asked"}},
}
_MEANINGS: Final = {
    200: "The answer",
    400: "The request is refused; the error names the field",
    401: "No key, or not a valid one",
    403: "This server may not do that: it has no admin API",
    404: "No such model, adapter or object here",
    409: "It does not go with how things stand: another generation, an edit that is not live, another declaration",
    413: "The body is over the server's limit",
    415: "The body does not say that it is JSON",
    422: "It was tried and cannot be had; nothing was changed",
    500: "The engine failed on this request",
    501: "Models come from the manifest here",
    502: "The hub cannot be reached, or refuses",
    503: "Loading, draining, or the queue is full: see Retry-After",
}


def _operation(api: str, operation: Operation, schema: Any, *, locked: bool) -> dict[str, Any]:
    content: dict[str, Any] = {operation.answer: {"schema": {"type": "object"} if operation.answer == _JSON else {}}}
    if operation.stream:
        content[operation.stream] = {"schema": {"description": "The same in pieces"}}  # readers parse each of them
    locked = locked and operation.path not in OPEN_PATHS
    answers: dict[str, Any] = {"200": {"description": _MEANINGS[200], "content": content}}
    for status in (*operation.status, *((401,) if locked else ())):
        error = {"$ref": "#/components/schemas/Error"} if operation.path != "/ready" else {"type": "object"}
        answers[str(status)] = {"description": _MEANINGS[status], "content": {_JSON: {"schema": error}}}
    made: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{operation.method}{operation.path}").strip("_"),
        "tags": [api or "server"],
        "responses": dict(sorted(answers.items())),
    }
    if parameters := list(_parameters(operation)):
        made["parameters"] = parameters
    if schema is not None:
        made["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    if locked:
        made["security"] = [{"key": []}]
    return made


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name in _PARAMETER.findall(operation.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    for name, schema in operation.query.items():
        yield {"name": name, "in": "query", "required": "default" not in schema, "schema": dict(schema)}


def main() -> None:
    """Prints the document with every API."""
    print(json.dumps(document([api for api in OPERATIONS if api]), indent=2, ensure_ascii=False))  # noqa: T201


if __name__ == "__main__":
    main()
