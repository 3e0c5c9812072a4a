"""Ollama's routes, under /api. What changes models there is the manifest's business here, and says so (501); a pull of
what is not served only fills the hub's cache."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, Final

import falcon
from falcon.asgi import App, Request, Response

from runner.errors import InvalidRequest, NotServed, Unavailable
from runner.gateway.admin.control import Control
from runner.gateway.backend import Directory, ModelCard, Route
from runner.gateway.decode import read_json
from runner.gateway.exchange import CUT_MESSAGE, exchange_of
from runner.gateway.generation import start
from runner.gateway.ollama.answers import Head, error_line, lines, loaded, whole
from runner.gateway.ollama.cards import show, tag
from runner.gateway.ollama.pull import Wanted, card_of, pulled, repository
from runner.gateway.ollama.translate import chat_generate, prompt_generate
from runner.gateway.ollama.wire import (
    CHANGES_A_MODEL,
    CHAT_NAMES,
    CREATE_NAMES,
    GENERATE_NAMES,
    PULL_NAMES,
    SHOW_NAMES,
    ChatRequest,
    GenerateRequest,
    chat_decoder,
    create_decoder,
    generate_decoder,
    pull_decoder,
    show_decoder,
)
from runner.gateway.openai.shapes import encode_json
from runner.gateway.streaming import LINES, answer_with
from runner.protocol import Generate
from runner.telemetry import GatewayMetrics

API_VERSION: Final = "0.12.0"
"""The version of Ollama's API that this follows: clients ask for it before they use what is newer."""

_CUT_LINE = error_line(Unavailable(CUT_MESSAGE, code="shutting_down"))


def add_routes(
    app: App[Any, Any],
    listener: str,
    directory: Directory,
    metrics: GatewayMetrics,
    control: Control | None = None,
) -> None:
    """Adds Ollama's API to a listener's app. With `control`, which a server with the admin API has, models can be
    pulled, and those in the hub's cache are listed."""
    answering = Answering(listener, directory, metrics)
    app.add_route("/api/chat", answering, suffix="chat")
    app.add_route("/api/generate", answering, suffix="generate")
    models = Models(listener, directory, control)
    for name in ("tags", "ps", "show", "pull", "create", "version"):
        app.add_route(f"/api/{name}", models, suffix=name)
    for name in ("copy", "delete", "push", "embed", "embeddings"):
        app.add_route(f"/api/{name}", NotHere(name))
    app.add_route("/", models, suffix="root")


def resolve(directory: Directory, listener: str, model: str, adapter: str | None = None) -> Route:
    """The route of a model's name as Ollama's clients write it: `:latest` is added by some of them.

    Raises what the directory raises.
    """
    try:
        return directory.resolve(listener, model, adapter)
    except NotServed:
        if not model.endswith(":latest"):
            raise
        return directory.resolve(listener, model.removesuffix(":latest"), adapter)


class Answering:
    """`/api/chat` and `/api/generate`."""

    def __init__(self, listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
        self._listener = listener
        self._directory = directory
        self._metrics = metrics

    async def on_post_chat(self, request: Request, response: Response) -> None:
        """Answers a conversation."""
        exchange_of(request).route = "/api/chat"
        fields = await read_json(request, chat_decoder, CHAT_NAMES, any_type=True)
        route = resolve(self._directory, self._listener, fields.model, fields.adapter_name)
        generate = chat_generate(fields, route) if fields.messages else None
        await self._answer(request, response, fields, route, generate)

    async def on_post_generate(self, request: Request, response: Response) -> None:
        """Answers a prompt."""
        exchange_of(request).route = "/api/generate"
        fields = await read_json(request, generate_decoder, GENERATE_NAMES, any_type=True)
        route = resolve(self._directory, self._listener, fields.model, fields.adapter_name)
        generate = prompt_generate(fields, route) if fields.prompt else None
        await self._answer(request, response, fields, route, generate)

    async def _answer(
        self,
        request: Request,
        response: Response,
        fields: ChatRequest | GenerateRequest,
        route: Route,
        generate: Generate | None,
    ) -> None:
        exchange = exchange_of(request)
        form: Any = "chat" if isinstance(fields, ChatRequest) else "generate"
        head = Head(fields.model, form, think=fields.think is not False, started=exchange.started)
        response.content_type = "application/json"
        if generate is None:
            unload = fields.keep_alive in (0, "0", "0s")
            if not unload:
                await _make_sure_of(route)
            response.data = loaded(head, "unload" if unload else "load")
            return
        generation = await start(route, [generate], exchange, self._metrics)
        if fields.stream is not False:
            stream = lines(generation, head, exchange)
            answer_with(stream, response, exchange, kind=LINES, cut=_CUT_LINE)
        else:
            response.data = await whole(generation, head)


async def _make_sure_of(route: Route) -> None:
    """Returns once the model is in memory. Raises what its deployment raises."""
    async with aclosing(route.deployment.generate(Generate(id=0, prompt="", count_only=True))) as deltas:
        await anext(deltas)


class Models:
    """What is served, and what this is."""

    def __init__(self, listener: str, directory: Directory, control: Control | None) -> None:
        self._listener = listener
        self._directory = directory
        self._control = control

    async def on_get_root(self, request: Request, response: Response) -> None:
        """Clients look here for a sign of life."""
        response.content_type = "text/plain; charset=utf-8"
        response.text = "mlx-run is running"

    on_head_root = on_get_root

    async def on_get_version(self, request: Request, response: Response) -> None:
        """The version of the API."""
        _send(request, response, "/api/version", {"version": API_VERSION})

    async def on_get_tags(self, request: Request, response: Response) -> None:
        """All models, with their aliases and adapters; where they can be pulled, also those that are here and that the
        manifest does not serve."""
        cards = self._directory.cards(self._listener)
        if self._control is not None:
            served = {name for card in cards for name in (card.id, card.source)}
            cards = cards + [card_of(model) for model in await self._control.cached() if model.repo not in served]
        _send(request, response, "/api/tags", {"models": [tag(card) for card in cards]})

    async def on_get_ps(self, request: Request, response: Response) -> None:
        """Those that are loaded."""
        cards = [card for card in self._directory.cards(self._listener) if card.loaded and card.id == card.model]
        stays = {"expires_at": "9999-12-31T23:59:59Z"}
        running = [{**tag(card), **stays, "size_vram": card.size, "context_length": card.max_context} for card in cards]
        _send(request, response, "/api/ps", {"models": running})

    async def on_post_show(self, request: Request, response: Response) -> None:
        """One model."""
        fields = await read_json(request, show_decoder, SHOW_NAMES, any_type=True)
        _send(request, response, "/api/show", show(self._card(fields.model or fields.name)))

    async def on_post_pull(self, request: Request, response: Response) -> None:
        """A model that is served is here already, by its name or its source's; a repository of the hub comes into its
        cache, where the server may do that."""
        exchange = exchange_of(request)
        exchange.route = "/api/pull"
        fields = await read_json(request, pull_decoder, PULL_NAMES, any_type=True)
        name = fields.model or fields.name
        wanted = repository(name)
        card = self._found(name) or (self._of_source(wanted) if wanted is not None else None)
        if card is not None or wanted is None:
            self._already_here(request, response, card or self._card(name), stream=fields.stream is not False)
            return
        if self._control is None:
            raise falcon.HTTPForbidden(description=_NO_PULL.format(name=name, repo=wanted.repo))
        coming = self._control.pull(wanted.repo, wanted.revision or "main")
        exchange.defer(coming.aclose)
        first = await anext(coming)  # what the hub refuses is told by the status
        if fields.stream is not False:
            answer_with(pulled(wanted, first, coming, exchange), response, exchange, kind=LINES, cut=_CUT_LINE)
            return
        async for _ in coming:
            pass
        _send(request, response, "/api/pull", {"status": "success"})

    async def on_post_create(self, request: Request, response: Response) -> None:
        """A model of the manifest is made already, as the manifest says; any other has to be written there first."""
        fields = await read_json(request, create_decoder, CREATE_NAMES, any_type=True)
        name = fields.model or fields.name
        if not name:
            raise InvalidRequest("`model` is missing", param="model", code="missing_field")
        card = self._found(name)
        base = None if fields.from_ is None else self._found(fields.from_)
        same = fields.from_ is None or (card is not None and (base == card or fields.from_ == card.source))
        if card is None or not same or any(getattr(fields, field) for field in CHANGES_A_MODEL):
            exchange_of(request).route = "/api/create"
            raise falcon.HTTPNotImplemented(description=_EDIT)
        self._already_here(request, response, card, stream=fields.stream is not False)

    def _already_here(self, request: Request, response: Response, card: ModelCard, *, stream: bool) -> None:
        if not stream:
            _send(request, response, request.path, {"status": "success"})
            return
        exchange_of(request).route = request.path
        response.content_type = LINES
        steps = ({"status": f"already here: {card.source}"}, {"status": "success"})
        response.data = b"".join(encode_json(step) + b"\n" for step in steps)

    def _found(self, name: str) -> ModelCard | None:
        known = {card.id: card for card in self._directory.cards(self._listener)}
        return known.get(name) or known.get(name.removesuffix(":latest"))

    def _of_source(self, wanted: Wanted) -> ModelCard | None:
        """What is served of a repository, at the revision that the manifest says, where a name asks for no other."""
        cards = self._directory.cards(self._listener)
        return None if wanted.revision else next((card for card in cards if card.source == wanted.repo), None)

    def _card(self, name: str) -> ModelCard:
        if not name:
            raise InvalidRequest("`model` is missing", param="model", code="missing_field")
        card = self._found(name)
        if card is None:
            raise NotServed(
                f"model '{name}' not found: it is not in the manifest", param="model", code="model_not_found"
            )
        return card


class NotHere:
    """What changes models, and what this version has no models for."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def on_post(self, request: Request, response: Response) -> None:
        """Says what to do in its place."""
        exchange_of(request).route = f"/api/{self._name}"
        raise falcon.HTTPNotImplemented(description=_NOT_HERE.get(self._name, _EDIT))

    on_delete = on_post


_NO_PULL: Final = (
    "model '{name}' is not served here, and this server may not download: give it the admin API "
    "(apis: [ollama, admin]), or run `mlx-run pull {repo}`"
)
_EDIT: Final = "models come from the manifest here: edit it, and mlx-run does the rest"
_EMBEDDINGS: Final = "this version serves chat and completion models, and none for embeddings"
_NOT_HERE: Final = {"embed": _EMBEDDINGS, "embeddings": _EMBEDDINGS, "push": "models are not pushed from here"}


def _send(request: Request, response: Response, route: str, body: Any) -> None:
    exchange_of(request).route = route
    response.content_type = "application/json"
    response.data = encode_json(body)
