"""Anthropic's routes: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from falcon.asgi import App, Request, Response

from runner.errors import Unavailable
from runner.gateway.anthropic.answers import Head, error_event, events, whole
from runner.gateway.anthropic.translate import counting, generating
from runner.gateway.anthropic.wire import (
    COUNT_NAMES,
    MESSAGES_NAMES,
    CountRequest,
    count_decoder,
    messages_decoder,
)
from runner.gateway.backend import Directory, Route
from runner.gateway.decode import read_json
from runner.gateway.exchange import CUT_MESSAGE, exchange_of
from runner.gateway.generation import start
from runner.gateway.openai.shapes import encode_json
from runner.gateway.streaming import EVENTS, answer_with
from runner.gateway.waiting import begin
from runner.telemetry import GatewayMetrics

PATH = "/v1/messages"
_CUT_EVENT = error_event(Unavailable(CUT_MESSAGE, code="shutting_down"))


def add_routes(app: App[Any, Any], listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
    """Adds Anthropic's API to a listener's app."""
    messages = Messages(listener, directory, metrics)
    app.add_route(PATH, messages)
    app.add_route(f"{PATH}/count_tokens", messages, suffix="count")


class Messages:
    """`/v1/messages`."""

    def __init__(self, listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
        self._listener = listener
        self._directory = directory
        self._metrics = metrics

    async def on_post(self, request: Request, response: Response) -> None:
        """Answers a conversation."""
        exchange = exchange_of(request)
        exchange.route = PATH
        response.set_header("request-id", exchange.request_id)  # of refusals, too
        fields = await read_json(request, messages_decoder, MESSAGES_NAMES)
        route = self._route(fields)
        requests = [generating(fields, route)]
        if route.adapter:
            response.set_header("x-mlx-run-adapter", route.adapter)
        head = Head(fields.model or route.model)
        if fields.stream:
            stream = await begin(
                route, requests, exchange, self._metrics, lambda g: events(g, head, exchange), error_event
            )
            answer_with(stream, response, exchange, kind=EVENTS, cut=_CUT_EVENT)
        else:
            response.content_type = "application/json"
            response.data = await whole(await start(route, requests, exchange, self._metrics), head)

    async def on_post_count(self, request: Request, response: Response) -> None:
        """Counts the tokens of a prompt, as the model's own template and tokenizer make it."""
        exchange = exchange_of(request)
        exchange.route = f"{PATH}/count_tokens"
        response.set_header("request-id", exchange.request_id)
        fields = await read_json(request, count_decoder, COUNT_NAMES)
        route = self._route(fields)
        async with aclosing(route.deployment.generate(counting(fields, route))) as deltas:
            usage = (await anext(deltas))[-1].usage
        assert usage is not None, "the engine answers a count with its usage"
        response.content_type = "application/json"
        response.data = encode_json({"input_tokens": usage.prompt_tokens})

    def _route(self, fields: CountRequest) -> Route:
        return self._directory.resolve(self._listener, fields.model, fields.adapter_name)
