"""What the gateway needs from whoever runs the engines. Control implements it; tests have a fake.

The gateway never starts, stops or inspects an engine: it asks a `Directory` for a `Route`, and the route's deployment
for a stream of deltas.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner.protocol import Delta, Generate, Stats


class Deployment(Protocol):
    """One served model. Its engine may be loading, ready, or gone; the object stays."""

    @property
    def name(self) -> str:
        """The manifest's name for it."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes requests: an engine has generated a token, or one is loaded when it is asked for."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether an engine is up."""
        ...

    @property
    def stats(self) -> Stats | None:
        """The engine's last counters, None before the first."""
        ...

    def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        """Deltas of one request, those that are there together in one list, until one has a `finish_reason`.

        Waits for a loading engine up to a deadline. `request.id` is replaced. Closing the generator cancels the row.

        Raises Unavailable (loading, draining, queue full), InvalidRequest, NotServed (from the engine's `Rejected`),
        EngineFailed (the engine died or failed mid-way).
        """
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. `adapter_key` is "" for the base model; `fingerprint` names weights and adapter version."""

    deployment: Deployment
    model: str
    adapter: str | None
    adapter_key: str
    fingerprint: str
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One line of `GET /v1/models`: a deployment, an alias, or `model:adapter`.

    `size` is the weights' bytes, `max_context` in tokens, 0 where the manifest does not limit it.
    """

    id: str
    created: int
    model: str
    adapter: str | None = None
    ready: bool = False
    source: str = ""
    size: int = 0
    digest: str = ""
    max_context: int = 0
    architecture: str = ""
    loaded: bool = False


class Directory(Protocol):
    """Which deployments a listener serves, as of now. A lookup is a snapshot: it costs no await."""

    def cards(self, listener: str) -> list[ModelCard]:
        """All ids that `resolve` takes for this listener: names, aliases, `name:adapter`."""
        ...

    def resolve(self, listener: str, model: str | None, adapter_name: str | None) -> Route:
        """The route for a request's `model` and `adapter_name`.

        `model` may be a name, an alias, or either with `:adapter`; None picks the listener's only model. Without an
        adapter the deployment's default adapter is used; `adapter_name` "none" or "base" asks for the plain model.

        Raises NotServed (unknown model or adapter), InvalidRequest (model missing and more than one is served; the id
        and `adapter_name` name different adapters).
        """
        ...

    def deployments(self, listener: str) -> list[Deployment]:
        """The listener's deployments, in the manifest's order."""
        ...
