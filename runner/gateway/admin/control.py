"""What the admin API needs from whoever reconciles. Control implements it; tests have a fake."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner.hub.download import Progress
from runner.plan.scope import Scope


@dataclass(frozen=True, slots=True)
class By:
    """Who asks, and for which generation; None for whichever is current."""

    user: str
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the plan (`runner.plan.render.plan_json`), the generation that is current now, and how what runs
    differs from the manifest, in a few words each."""

    plan: dict[str, Any]
    generation: int
    seconds: float
    drift: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the hub's cache, whether it is served or not. `size` is bytes on the disk, `since` seconds since the
    epoch, `architecture` its model type, empty where that cannot be read."""

    repo: str
    commit: str
    size: int
    since: int
    architecture: str = ""


class Control(Protocol):
    """One runner. Each change waits for those before it, is all or nothing, and goes on to its end when whoever asked
    has left.

    All but `status` raise RequestError for what the request itself cannot have (Conflict, NotServed, CannotBeDone), and
    others of the tree: ManifestError, EngineLoadError, EngineDied, ListenerError, StaleGeneration, Interrupted.
    """

    def status(self) -> dict[str, Any]:
        """What `mlx-run status --json` prints."""
        ...

    async def available(self) -> dict[str, Any]:
        """What `mlx-run models list --json` prints."""
        ...

    async def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """What `mlx-run models search --json` prints. Raises Unavailable where the hub is not to be asked, and
        HubFailed."""
        ...

    async def cached(self) -> list[CachedModel]:
        """Models of the hub's cache, one commit of each repository."""
        ...

    def pull(self, repo: str, revision: str) -> AsyncGenerator[Progress, None]:
        """Bring a repository into the hub's cache; what is served stays as it is. An empty `revision` is the one that
        the manifest asks for, of what it could not have yet, else main. Closing the generator ends it. Raises NotServed
        (there is none), CannotBeDone (no room), Unavailable (offline) and HubFailed."""
        ...

    async def plan(self, scope: Scope) -> Outcome:
        """What `apply` would do now."""
        ...

    async def apply(self, scope: Scope, by: By, seconds: float | None) -> Outcome:
        """Make the manifest live as its files are now; given up after that many seconds."""
        ...

    async def load_model(self, name: str, entry: Mapping[str, Any] | None, servers: tuple[str, ...], by: By) -> Outcome:
        """Serve a model: as `entry` says, which is one of the manifest's, or as the manifest has it."""
        ...

    async def unload_model(self, name: str, by: By) -> Outcome:
        """Drain and stop a model until it is loaded again."""
        ...

    async def load_adapter(self, model: str, name: str, entry: Mapping[str, Any] | None, by: By) -> Outcome:
        """Serve an adapter beside those of its model."""
        ...

    async def unload_adapter(self, model: str, name: str, by: By) -> Outcome:
        """Drop an adapter of a model; running requests finish with it."""
        ...
