"""The admin API's routes: what `mlx-run` does to a runner, over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec
from falcon.asgi import App, Request, Response

from runner.errors import (
    CannotBeDone,
    Conflict,
    EngineLoadError,
    Interrupted,
    InvalidRequest,
    ListenerError,
    ManifestError,
    RunnerError,
    SourceChanged,
    StaleGeneration,
)
from runner.gateway.admin.control import By, Control, Outcome
from runner.gateway.admin.wire import (
    DECODERS,
    NAMES,
    Apply,
    LoadAdapter,
    LoadModel,
    Plan,
    UnloadAdapter,
    UnloadModel,
    read_search,
)
from runner.gateway.decode import read_json
from runner.gateway.exchange import exchange_of
from runner.plan.scope import Scope

T = TypeVar("T")

_OWN_FIELDS = ("source", "revision")


def add_routes(app: App[Any, Any], listener: str, control: Control) -> None:
    """Adds the admin API to a listener's app."""
    runner = Runner(listener, control)
    app.add_route("/v1/status", runner, suffix="status")
    app.add_route("/v1/models/available", runner, suffix="available")
    app.add_route("/v1/models/search", runner, suffix="search")
    app.add_route("/v1/plan", runner, suffix="plan")
    app.add_route("/v1/apply", runner, suffix="apply")
    parts = Parts(listener, control)
    app.add_route("/v1/models/load", parts, suffix="load_model")
    app.add_route("/v1/models/unload", parts, suffix="unload_model")
    app.add_route("/v1/adapters/load", parts, suffix="load_adapter")
    app.add_route("/v1/adapters/unload", parts, suffix="unload_adapter")


class _Asked:
    """What all of them do."""

    def __init__(self, listener: str, control: Control) -> None:
        self._listener = listener
        self._control = control

    async def _read(self, request: Request, kind: type[T], *, empty: bool = False) -> T:
        """The body. Without one it is as if it were `{}`, where nothing has to be said; but a page on the web, which
        may send such a request without asking its browser's leave, has to say so in JSON."""
        exchange_of(request).route = request.path
        bare = request.content_length in (None, 0) and request.content_type is None
        if empty and bare and request.get_header("origin") is None:
            return kind()
        fields: T = await read_json(request, DECODERS[kind], NAMES[kind])  # type: ignore[index]
        return fields

    def _by(self, generation: int | None) -> By:
        return By(f"servers.{self._listener}", generation)


class Runner(_Asked):
    """`/v1/status`, `/v1/models/available` and `search`, `/v1/plan` and `/v1/apply`."""

    async def on_get_status(self, request: Request, response: Response) -> None:
        """What is up, and how it stands."""
        exchange_of(request).route = request.path
        _send(response, self._control.status())

    async def on_get_available(self, request: Request, response: Response) -> None:
        """What is in the hub's cache and in the folders that manifests use."""
        exchange_of(request).route = request.path
        _send(response, await self._control.available())

    async def on_get_search(self, request: Request, response: Response) -> None:
        """What the hub has for some words, and whether it would fit here."""
        exchange_of(request).route = request.path
        query, limit = read_search(request.params)
        _send(response, {"models": await self._control.search(query, limit)})

    async def on_post_plan(self, request: Request, response: Response) -> None:
        """What apply would do."""
        fields = await self._read(request, Plan, empty=True)
        scope = Scope(tuple(fields.target), fields.prune)
        _send(response, _shown(await _tried(self._control.plan(scope))))

    async def on_post_apply(self, request: Request, response: Response) -> None:
        """Makes the manifest live, as its files are now."""
        fields = await self._read(request, Apply, empty=True)
        scope = Scope(tuple(fields.target), fields.prune)
        applying = self._control.apply(scope, self._by(fields.generation), fields.timeout_seconds)
        _send(response, _shown(await _tried(applying)))


class Parts(_Asked):
    """Models and adapters, one at a time."""

    async def on_post_load_model(self, request: Request, response: Response) -> None:
        """Serves a model."""
        fields = await self._read(request, LoadModel)
        entry, by = _model_entry(fields), self._by(fields.generation)
        servers = (self._listener,) if fields.servers is None else tuple(fields.servers)
        _send(response, _shown(await _tried(self._control.load_model(fields.model, entry, servers, by))))

    async def on_post_unload_model(self, request: Request, response: Response) -> None:
        """Stops a model."""
        fields = await self._read(request, UnloadModel)
        unloading = self._control.unload_model(fields.model, self._by(fields.generation))
        _send(response, _shown(await _tried(unloading)))

    async def on_post_load_adapter(self, request: Request, response: Response) -> None:
        """Serves an adapter."""
        fields = await self._read(request, LoadAdapter)
        entry = _entry(fields.source, revision=fields.revision, scale=fields.scale)
        loading = self._control.load_adapter(fields.model, fields.adapter, entry, self._by(fields.generation))
        _send(response, _shown(await _tried(loading)))

    async def on_post_unload_adapter(self, request: Request, response: Response) -> None:
        """Drops an adapter."""
        fields = await self._read(request, UnloadAdapter)
        unloading = self._control.unload_adapter(fields.model, fields.adapter, self._by(fields.generation))
        _send(response, _shown(await _tried(unloading)))


def _model_entry(fields: LoadModel) -> dict[str, Any] | None:
    config = fields.config or {}
    for name in _OWN_FIELDS:
        if name in config:
            raise InvalidRequest(f"`{name}` stands beside `config`, not in it", param=f"config.{name}")
    for name, section in (("config", config), ("config.draft", config.get("draft"))):
        if isinstance(section, dict) and section.get("trust_remote_code"):
            message = f"`{name}.trust_remote_code`: a model's own code runs by leave of the manifest alone"
            raise InvalidRequest(message, param=f"{name}.trust_remote_code", code="not_by_api")
    adapters = config.get("adapters")
    if adapters is not None and not isinstance(adapters, dict):
        raise InvalidRequest("`config.adapters` should be an object", param="config.adapters", code="invalid_value")
    return _entry(fields.source, revision=fields.revision, **{k: v for k, v in config.items() if v is not None})


def _entry(source: str | None, **more: Any) -> dict[str, Any] | None:
    """An entry of the manifest, None where it is to be one that is there already. Raises InvalidRequest."""
    given = {name: value for name, value in more.items() if value is not None}
    if source is None and given:
        raise InvalidRequest(f"`{next(iter(given))}` needs `source`", param="source", code="missing_field")
    return None if source is None else {"source": source, **given}


async def _tried(work: Awaitable[T]) -> T:
    """What a request for a change gets: what cannot be had is its own doing, not the server's."""
    try:
        return await work
    except StaleGeneration as error:
        raise Conflict(str(error), param="generation", code="stale_generation") from None
    except Interrupted as error:
        raise Conflict(str(error), code="timed_out") from None
    except ManifestError as error:
        raise CannotBeDone(str(error), code=error.diagnostics[0].code or "manifest") from None
    except EngineLoadError as error:
        raise CannotBeDone(str(error), code="cannot_load") from None
    except SourceChanged as error:
        raise Conflict(str(error), code="source_changed") from None
    except (RunnerError, ListenerError) as error:
        raise Conflict(str(error), code="conflict") from None


def _shown(outcome: Outcome) -> dict[str, Any]:
    return {
        "generation": outcome.generation,
        "seconds": round(outcome.seconds, 3),
        "drift": list(outcome.drift),
        "plan": outcome.plan,
    }


def _send(response: Response, body: Any) -> None:
    response.content_type = "application/json"
    response.data = msgspec.json.encode(body, enc_hook=str)
