"""Which deployments each listener serves: an immutable snapshot, replaced as a whole when a plan is committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from runner.control.deployment import Deployment
from runner.errors import InvalidRequest, NotServed, Unavailable
from runner.gateway.backend import Deployment as Served
from runner.gateway.backend import ModelCard, Route
from runner.manifest.names import PLAIN_MODEL
from runner.plan.spec import AdapterSpec, ListenerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class _Entry:
    deployment: Deployment
    spec: ModelSpec
    created: int


@dataclass(frozen=True, slots=True)
class _Table:
    """One listener's models, by name and by every id that means them. `resting` are names that it would serve."""

    entries: tuple[_Entry, ...] = ()
    resting: frozenset[str] = frozenset()
    by_id: Mapping[str, _Entry] = field(default_factory=dict)


class Directory:
    """Implements `runner.gateway.backend.Directory`."""

    def __init__(self) -> None:
        self._tables: Mapping[str, _Table] = {}

    def publish(
        self, listeners: Iterable[ListenerSpec], deployments: Mapping[str, Deployment], *, created: Mapping[str, int]
    ) -> None:
        """Serve this from now on. `created` is when each deployment came up, in seconds since the epoch."""
        self._tables = {
            listener.name: _table(
                [_Entry(deployments[m], deployments[m].spec, created[m]) for m in listener.models if m in deployments],
                frozenset(listener.models).difference(deployments),
            )
            for listener in listeners
        }

    def cards(self, listener: str) -> list[ModelCard]:
        """See the interface."""
        cards: list[ModelCard] = []
        for entry in self._table(listener).entries:
            spec, ready = entry.spec, entry.deployment.ready
            base = ModelCard(
                spec.name,
                entry.created,
                spec.name,
                None,
                ready,
                source=spec.source,
                size=spec.weights_bytes,
                digest=spec.weights_digest,
                max_context=spec.limits.max_context,
                loaded=entry.deployment.loaded,
            )
            for model_id in (spec.name, *spec.aliases):
                cards.append(replace(base, id=model_id))
                cards += [
                    replace(base, id=f"{model_id}:{a.name}", adapter=a.name, digest=a.digest) for a in spec.adapters
                ]
        return cards

    def deployments(self, listener: str) -> list[Served]:
        """See the interface."""
        return [entry.deployment for entry in self._table(listener).entries]

    def resolve(self, listener: str, model: str | None, adapter_name: str | None) -> Route:
        """See the interface."""
        entry, from_id = self._entry(listener, model)
        name = _one_adapter(from_id, adapter_name)
        if name in PLAIN_MODEL:
            name = None
        elif name is None:
            name = entry.spec.default_adapter
        adapter = None if name is None else _adapter(entry.spec, name, by_id=from_id is not None)
        return Route(
            deployment=entry.deployment,
            model=entry.spec.name,
            adapter=name,
            adapter_key=adapter.key if adapter else "",
            fingerprint=_fingerprint(entry.spec, adapter),
            generation=entry.spec.generation,
        )

    def _table(self, listener: str) -> _Table:
        return self._tables.get(listener, _Table())

    def _entry(self, listener: str, model: str | None) -> tuple[_Entry, str | None]:
        """The deployment an id means, and the adapter the id names."""
        if listener not in self._tables:
            raise Unavailable("this server is being set up", retry_after=1.0)
        table = self._tables[listener]
        if not model:
            if len(table.entries) == 1:
                return table.entries[0], None
            raise InvalidRequest(
                "`model` is missing, and this server has more than one: "
                + ", ".join(e.spec.name for e in table.entries),
                param="model",
            )
        if model in table.by_id:
            return table.by_id[model], None
        base, colon, adapter = model.rpartition(":")
        if colon and base in table.by_id:
            return table.by_id[base], adapter
        if model in table.resting or base in table.resting:
            raise NotServed(
                f"The model `{model if model in table.resting else base}` was unloaded; POST /v1/models/load on a "
                "server with the admin API, or `mlx-run apply`, brings it back.",
                param="model",
                code="model_unloaded",
            )
        served = ", ".join(e.spec.name for e in table.entries) or "no models"
        raise NotServed(
            f"The model `{model}` is not served here; this server has {served}.", param="model", code="model_not_found"
        )


def _table(entries: list[_Entry], resting: frozenset[str]) -> _Table:
    by_id = {i: e for e in entries for i in (e.spec.name, *e.spec.aliases)}
    return _Table(tuple(entries), resting, by_id)


def _one_adapter(from_id: str | None, adapter_name: str | None) -> str | None:
    if from_id is not None and adapter_name and adapter_name != from_id:
        raise InvalidRequest(
            f"`model` names the adapter {from_id!r} and `adapter_name` names {adapter_name!r}; send one of them",
            param="adapter_name",
        )
    return from_id or adapter_name or None


def _adapter(spec: ModelSpec, name: str, *, by_id: bool) -> AdapterSpec:
    adapter = spec.adapter(name)
    if adapter is None:
        has = ", ".join(a.name for a in spec.adapters) or "none"
        raise NotServed(
            f"The model `{spec.name}` has no adapter `{name}`; it has: {has}.",
            param="model" if by_id else "adapter_name",
            code="adapter_not_found",
        )
    return adapter


def _fingerprint(spec: ModelSpec, adapter: AdapterSpec | None) -> str:
    base = f"fp_{spec.weights_digest[:10]}"
    return f"{base}_{adapter.key[:10]}" if adapter else base
