"""`/v1/responses`, and what was answered there before."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from falcon.asgi import App, Request, Response

from runner.errors import InvalidRequest, NotServed, Unavailable
from runner.gateway.backend import Directory
from runner.gateway.decode import convert, read_json
from runner.gateway.errors import as_event, describe, report
from runner.gateway.exchange import CUT_MESSAGE, Exchange, exchange_of, new_id
from runner.gateway.generation import Generation, start
from runner.gateway.openai.shapes import encode_json
from runner.gateway.responses.answers import Building, Object, new_response
from runner.gateway.responses.store import ResponseStore, Stored
from runner.gateway.responses.translate import Turns, generating, input_turns, turns_of
from runner.gateway.responses.wire import NAMES, Item, ResponsesRequest, responses_decoder
from runner.gateway.streaming import EVENTS, answer_with
from runner.gateway.waiting import begin
from runner.telemetry import GatewayMetrics

PATH = "/v1/responses"
_CUT_EVENT = as_event(Unavailable(CUT_MESSAGE, code="shutting_down"))


def add_routes(app: App[Any, Any], listener: str, directory: Directory, metrics: GatewayMetrics) -> None:
    """Adds the Responses API to a listener's app."""
    responses = Responses(listener, directory, metrics, ResponseStore())
    app.add_route(PATH, responses)
    app.add_route(f"{PATH}/input_tokens", responses, suffix="input_tokens")
    app.add_route(f"{PATH}/{{response_id}}", responses, suffix="one")
    app.add_route(f"{PATH}/{{response_id}}/input_items", responses, suffix="items")


class Responses:
    """All of it. Answers are kept unless `store` is false."""

    def __init__(self, listener: str, directory: Directory, metrics: GatewayMetrics, store: ResponseStore) -> None:
        self._listener = listener
        self._directory = directory
        self._metrics = metrics
        self._store = store

    async def on_post(self, request: Request, response: Response) -> None:
        """Answers an input, perhaps as the next turn after an earlier response."""
        exchange = exchange_of(request)
        exchange.route = PATH
        fields = await read_json(request, responses_decoder, NAMES)
        route = self._directory.resolve(self._listener, fields.model, fields.adapter_name)
        turns = [*self._earlier(fields.previous_response_id), *input_turns(fields)]
        generate = generating(fields, route, turns)
        building = Building(new_response(fields, generate, fields.model or route.model))
        if route.adapter:
            response.set_header("x-mlx-run-adapter", route.adapter)
        if fields.stream:
            stream = await begin(
                route,
                [generate],
                exchange,
                self._metrics,
                lambda generation: self._events(generation, building, fields, turns, exchange),
                as_event,
            )
            answer_with(stream, response, exchange, kind=EVENTS, cut=_CUT_EVENT)
            return
        generation = await start(route, [generate], exchange, self._metrics)
        list(building.add(generation.first[1]))
        async for _, deltas in generation.rest:
            list(building.add(deltas))
        self._keep(building.response, fields, turns)
        response.content_type = "application/json"
        response.data = encode_json(building.response)

    async def on_post_input_tokens(self, request: Request, response: Response) -> None:
        """Counts the tokens of an input, as the model's own template and tokenizer make it."""
        exchange_of(request).route = f"{PATH}/input_tokens"
        fields = await read_json(request, responses_decoder, NAMES)
        route = self._directory.resolve(self._listener, fields.model, fields.adapter_name)
        turns = [*self._earlier(fields.previous_response_id), *input_turns(fields)]
        counting = msgspec.structs.replace(generating(fields, route, turns), count_only=True)
        async with aclosing(route.deployment.generate(counting)) as deltas:
            usage = (await anext(deltas))[-1].usage
        assert usage is not None, "the engine answers a count with its usage"
        response.content_type = "application/json"
        response.data = encode_json({"object": "response.input_tokens", "input_tokens": usage.prompt_tokens})

    async def on_get_one(self, request: Request, response: Response, response_id: str) -> None:
        """An answer that was kept."""
        exchange_of(request).route = f"{PATH}/{{id}}"
        response.content_type = "application/json"
        response.data = self._stored(response_id).response

    async def on_post_one(self, request: Request, response: Response, response_id: str) -> None:
        """Other services have operations here (`compact`, `{id}/cancel`); a path that is not there is a 404."""
        exchange_of(request).route = f"{PATH}/{{id}}"
        raise NotServed(f"no such path: POST {PATH}/{response_id}", code="not_found")

    async def on_delete_one(self, request: Request, response: Response, response_id: str) -> None:
        """Forgets an answer."""
        exchange_of(request).route = f"{PATH}/{{id}}"
        self._stored(response_id)
        self._store.drop(response_id)
        response.content_type = "application/json"
        response.data = encode_json({"id": response_id, "object": "response", "deleted": True})

    async def on_get_items(self, request: Request, response: Response, response_id: str) -> None:
        """What a response answered."""
        exchange_of(request).route = f"{PATH}/{{id}}/input_items"
        items = msgspec.json.decode(self._stored(response_id).items)
        ends = {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
        response.content_type = "application/json"
        response.data = encode_json({"object": "list", "data": items, **ends, "has_more": False})

    async def _events(
        self, generation: Generation, building: Building, fields: ResponsesRequest, turns: Turns, exchange: Exchange
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield b"".join(building.begin()) + b"".join(building.add(generation.first[1]))
            async for _, deltas in generation.rest:
                # What is kept has to be there before the client hears of the end.
                data = b"".join(building.add(deltas))
                if deltas[-1].finish_reason is not None:
                    self._keep(building.response, fields, turns)
                if data:
                    yield data
        except Exception as error:  # noqa: BLE001 - the status has been sent: only the stream is left to say it
            report(error, {"request_id": exchange.request_id, "route": exchange.route})
            exchange.status, _, body = describe(error)
            yield b"".join(building.fail(msgspec.json.decode(body)["error"]))

    def _keep(self, response: Object, fields: ResponsesRequest, turns: Turns) -> None:
        if fields.store is False:
            return
        output: list[Item] = [convert(_input_item(item), Item, "output", NAMES) for item in response["output"]]
        self._store.keep(response, _items(fields), [*turns, *turns_of(output)])

    def _earlier(self, response_id: str | None) -> Turns:
        if response_id is None:
            return []
        entry = self._store.get(response_id)
        if entry is None:
            raise InvalidRequest(
                f"no response `{response_id}` is kept here: it was not stored, or was given up for newer ones; "
                "send the conversation in `input`",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        turns: Turns = msgspec.json.decode(entry.turns)
        return turns

    def _stored(self, response_id: str) -> Stored:
        entry = self._store.get(response_id)
        if entry is None:
            raise NotServed(f"no response `{response_id}` is kept here", param="response_id", code="not_found")
        return entry


def _input_item(item: Object) -> Object:
    """An item of an answer as an item of an input."""
    return {name: value for name, value in item.items() if name != "logprobs"}


def _items(fields: ResponsesRequest) -> list[Object]:
    """The request's own items, each with an id."""
    if isinstance(fields.input, str):
        content = [{"type": "input_text", "text": fields.input}]
        return [{"id": new_id("msg_"), "type": "message", "role": "user", "status": "completed", "content": content}]
    return [{"type": "message", **item, "id": item.get("id") or new_id("item_")} for item in fields.input]
