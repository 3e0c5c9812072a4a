"""OpenAI's routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

import time
from typing import Any, Final

from falcon.asgi import App, Request, Response

from runner.errors import InvalidRequest, NotServed, Unavailable
from runner.gateway.backend import Directory, ModelCard, Route
from runner.gateway.decode import read_json
from runner.gateway.errors import as_event
from runner.gateway.exchange import CUT_MESSAGE, exchange_of, new_id
from runner.gateway.generation import start
from runner.gateway.openai.answers import events, whole
from runner.gateway.openai.shapes import ChatShape, CompletionShape, Head, Shape, encode_json
from runner.gateway.openai.translate import chat_generates, completion_generates, echoes
from runner.gateway.openai.wire import (
    CHAT_NAMES,
    COMPLETION_NAMES,
    CommonFields,
    CompletionRequest,
    chat_decoder,
    completion_decoder,
)
from runner.gateway.streaming import EVENTS, answer_with
from runner.gateway.waiting import begin
from runner.protocol import Generate
from runner.telemetry import GatewayMetrics

_CHAT = ChatShape()
_COMPLETION = CompletionShape()
_CUT_EVENT = as_event(Unavailable(CUT_MESSAGE, code="shutting_down"))


def add_routes(app: App[Any, Any], listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
    """Adds OpenAI's API to a listener's app."""
    app.add_route("/v1/chat/completions", ChatCompletions(listener, directory, metrics))
    app.add_route("/v1/completions", Completions(listener, directory, metrics))
    models = Models(listener, directory)
    app.add_route("/v1/models", models)
    app.add_route("/v1/models/{model_id:path}", models, suffix="one")
    for path, kind in OTHER_KINDS.items():
        app.add_route(path, OtherKind(path, kind))


OTHER_KINDS: Final = {
    "/v1/embeddings": "a model for embeddings",
    "/v1/rerank": "a model that ranks",
    "/v1/images/generations": "a model that draws",
    "/v1/images/edits": "a model that draws",
    "/v1/images/variations": "a model that draws",
    "/v1/audio/speech": "a model that speaks",
    "/v1/audio/transcriptions": "a model that listens",
    "/v1/audio/translations": "a model that listens",
    "/v1/moderations": "a model that moderates",
}
"""What OpenAI's API has for other kinds of models, and what kind that is."""


class OtherKind:
    """A path for models of which this version serves none."""

    def __init__(self, path: str, kind: str) -> None:
        self._path = path
        self._kind = kind

    async def on_post(self, request: Request, response: Response) -> None:
        """Says which kinds there are."""
        exchange_of(request).route = self._path
        raise InvalidRequest(
            f"{self._path} needs {self._kind}, and this version serves none: its models are for text, by "
            "/v1/chat/completions, /v1/responses and /v1/completions",
            code="unsupported_endpoint",
        )


class _Generating:
    """What both kinds of completions do once a request is a list of `Generate`."""

    def __init__(self, listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
        self._listener = listener
        self._directory = directory
        self._metrics = metrics

    def _route(self, fields: CommonFields) -> Route:
        return self._directory.resolve(self._listener, fields.model, fields.adapter_name)

    async def _answer(
        self,
        request: Request,
        response: Response,
        fields: CommonFields,
        route: Route,
        generates: list[Generate],
        shape: Shape,
    ) -> None:
        exchange = exchange_of(request)
        head = Head(
            shape=shape,
            id=new_id(shape.id_prefix),
            created=int(time.time()),
            model=fields.model or route.model,
            fingerprint=route.fingerprint,
            with_logprobs=generates[0].sampling.logprobs is not None,
            with_usage=bool(fields.stream_options and fields.stream_options.include_usage),
            per_prompt=fields.n or 1,
            echoes=echoes(fields) if isinstance(fields, CompletionRequest) else (),
        )
        if route.adapter:
            response.set_header("x-mlx-run-adapter", route.adapter)
        if fields.stream:
            stream = await begin(
                route, generates, exchange, self._metrics, lambda g: events(g, head, exchange), as_event
            )
            answer_with(stream, response, exchange, kind=EVENTS, cut=_CUT_EVENT)
        else:
            response.content_type = "application/json"
            response.data = await whole(await start(route, generates, exchange, self._metrics), head)


class ChatCompletions(_Generating):
    """`/v1/chat/completions`."""

    async def on_post(self, request: Request, response: Response) -> None:
        """Answers a conversation."""
        exchange_of(request).route = "/v1/chat/completions"
        fields = await read_json(request, chat_decoder, CHAT_NAMES)
        route = self._route(fields)
        await self._answer(request, response, fields, route, chat_generates(fields, route), _CHAT)


class Completions(_Generating):
    """`/v1/completions`."""

    async def on_post(self, request: Request, response: Response) -> None:
        """Continues one or several prompts."""
        exchange_of(request).route = "/v1/completions"
        fields = await read_json(request, completion_decoder, COMPLETION_NAMES)
        route = self._route(fields)
        await self._answer(request, response, fields, route, completion_generates(fields, route), _COMPLETION)


class Models:
    """`/v1/models`: deployments, their aliases, and each with its adapters."""

    def __init__(self, listener: str, directory: Directory) -> None:
        self._listener = listener
        self._directory = directory

    async def on_get(self, request: Request, response: Response) -> None:
        """All of them."""
        exchange_of(request).route = "/v1/models"
        cards = [_card(card) for card in self._directory.cards(self._listener)]
        response.content_type = "application/json"
        response.data = encode_json({"object": "list", "data": cards})

    async def on_get_one(self, request: Request, response: Response, model_id: str) -> None:
        """One of them; its id may contain `:` and `/`."""
        exchange_of(request).route = "/v1/models/{id}"
        for card in self._directory.cards(self._listener):
            if card.id == model_id:
                response.content_type = "application/json"
                response.data = encode_json(_card(card))
                return
        raise NotServed(f"no model `{model_id}` here; GET /v1/models lists them", param="model", code="model_not_found")


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "mlx-run",
        "root": card.model,
        "adapter": card.adapter,
        "ready": card.ready,
        "loaded": card.loaded,
    }
