"""`/v1/models` as Anthropic has it. OpenAI's clients ask at the same path: who sends `anthropic-version` is none of
those."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from falcon.asgi import App, Request, Response

from runner.errors import NotServed
from runner.gateway.backend import Directory, ModelCard
from runner.gateway.exchange import exchange_of
from runner.gateway.openai import resources as openai
from runner.gateway.openai.shapes import encode_json


def add_models(app: App[Any, Any], listener: str, directory: Directory, *, shared: bool) -> None:
    """Adds the list of models to a listener's app, over that of OpenAI's API where the path is `shared`."""
    models = Models(listener, directory, openai.Models(listener, directory) if shared else None)
    app.add_route("/v1/models", models)
    app.add_route("/v1/models/{model_id:path}", models, suffix="one")


class Models:
    """Deployments, their aliases, and each with its adapters. `others` answers clients of another kind."""

    def __init__(self, listener: str, directory: Directory, others: openai.Models | None) -> None:
        self._listener = listener
        self._directory = directory
        self._others = others

    async def on_get(self, request: Request, response: Response) -> None:
        """All of them, on one page."""
        if self._others is not None and request.get_header("anthropic-version") is None:
            await self._others.on_get(request, response)
            return
        exchange_of(request).route = "/v1/models"
        data = [_card(card) for card in self._directory.cards(self._listener)]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        response.content_type = "application/json"
        response.data = encode_json({"data": data, "has_more": False, **ends})

    async def on_get_one(self, request: Request, response: Response, model_id: str) -> None:
        """One of them."""
        if self._others is not None and request.get_header("anthropic-version") is None:
            await self._others.on_get_one(request, response, model_id)
            return
        exchange_of(request).route = "/v1/models/{id}"
        card = next((card for card in self._directory.cards(self._listener) if card.id == model_id), None)
        if card is None:
            raise NotServed(f"no model `{model_id}` here; GET /v1/models lists them", code="model_not_found")
        response.content_type = "application/json"
        response.data = encode_json(_card(card))


def _card(card: ModelCard) -> dict[str, Any]:
    created = datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": card.id, "display_name": card.id, "created_at": created}
