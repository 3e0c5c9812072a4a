"""The runner as its admin API sees it: requests for changes, on the way that every edit takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.control.attempt import Attempt
from runner.control.drift import Edit
from runner.control.events import EventLog
from runner.control.inventory import inventory
from runner.control.ledger import Cause
from runner.control.pulling import cached_models, hub_error, pull
from runner.control.reconciler import Pass, Reconciler
from runner.control.searching import search_hub
from runner.errors import HubFailed, InvalidRequest, Unavailable
from runner.gateway.admin.control import By, CachedModel, Outcome
from runner.hub.download import Progress, Refused
from runner.hub.jobs import Job, Patience
from runner.manifest import drift
from runner.plan.render import plan_json
from runner.plan.scope import Scope
from runner.plan.spec import Download

Start = Callable[[Coroutine[Any, Any, Pass]], asyncio.Task[Pass]]
"""Runs a pass that whoever asked for it does not own."""


SEARCH_TIMEOUT = 20.0
"""Seconds: the hub's library has a patience of its own with a network that is not there."""

_HURRIED: Final = Patience(tries=3, first=0.5, longest=2.0, asked=5.0)
"""With the hub, while somebody waits for an answer over HTTP."""


def _job(repo: str, revision: str, missing: Iterable[Download]) -> Job:
    """What to fetch of a repository: as the manifest asks for it, where it does and another revision is not named."""
    for wanted in missing:
        if wanted.repo == repo and revision in ("", wanted.revision):
            return Job(repo, wanted.revision, wanted.kinds, code=wanted.code)
    return Job(repo, revision or "main")


class Places(NamedTuple):
    """Where the runners of this user keep their state, this one its log, and all of them their quantised copies."""

    state: Path
    log: Path
    converted: Path


class Admin:
    """Implements `runner.gateway.admin.control.Control`. `servers` are the names of those that there are."""

    def __init__(
        self,
        reconciler: Reconciler,
        status: Callable[[], dict[str, Any]],
        servers: Callable[[], Collection[str]],
        start: Start,
        places: Places,
        events: EventLog,
    ) -> None:
        self._reconciler = reconciler
        self._status = status
        self._servers = servers
        self._start = start
        self._places = places
        self._events = events

    def status(self) -> dict[str, Any]:
        """See the interface."""
        return self._status()

    async def available(self) -> dict[str, Any]:
        """See the interface."""
        return await inventory(self._places.state, self._places.converted)

    async def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """See the interface."""
        try:
            async with asyncio.timeout(SEARCH_TIMEOUT):
                found = await search_hub(query, limit, self._reconciler.followed.hub_token, _HURRIED)
        except Refused as refused:
            raise hub_error(refused.failures[0]) from None
        except TimeoutError:
            raise HubFailed(f"the hub gave no answer in {SEARCH_TIMEOUT:g} seconds", code="E804") from None
        return [one.as_json for one in found]

    async def cached(self) -> list[CachedModel]:
        """See the interface."""
        return await asyncio.to_thread(cached_models)

    def pull(self, repo: str, revision: str) -> AsyncGenerator[Progress, None]:
        """See the interface."""
        job = _job(repo, revision, self._reconciler.followed.missing)
        return pull(job, self._events, token=self._reconciler.followed.hub_token, log=self._places.log)

    async def plan(self, scope: Scope) -> Outcome:
        """See the interface."""
        reconciler = self._reconciler
        made = await reconciler.preview(reconciler.followed.paths, scope)
        return Outcome(plan_json(made), reconciler.generation, 0.0, made.drift)

    async def apply(self, scope: Scope, by: By, seconds: float | None) -> Outcome:
        """See the interface."""
        reconciler = self._reconciler
        cause, attempt = Cause("apply", by.user, by.generation), Attempt(seconds)
        applying = reconciler.apply(
            reconciler.followed.paths, cause, watch=reconciler.followed.watching, scope=scope, attempt=attempt
        )
        return await self._done(applying)

    async def load_model(self, name: str, entry: Mapping[str, Any] | None, servers: tuple[str, ...], by: By) -> Outcome:
        """See the interface."""
        known = self._servers()
        for server in servers:
            if server not in known:
                raise InvalidRequest(f"there is no server `{server}`; there are: {', '.join(known)}", param="servers")
        return await self._change(partial(drift.load_model, name=name, entry=entry, servers=servers), by)

    async def unload_model(self, name: str, by: By) -> Outcome:
        """See the interface."""
        return await self._change(partial(drift.unload_model, name=name), by)

    async def load_adapter(self, model: str, name: str, entry: Mapping[str, Any] | None, by: By) -> Outcome:
        """See the interface."""
        return await self._change(partial(drift.load_adapter, model=model, name=name, entry=entry), by)

    async def unload_adapter(self, model: str, name: str, by: By) -> Outcome:
        """See the interface."""
        return await self._change(partial(drift.unload_adapter, model=model, name=name), by)

    async def _change(self, edit: Edit, by: By) -> Outcome:
        return await self._done(self._reconciler.change(edit, Cause("api", by.user, by.generation)))

    async def _done(self, passing: Coroutine[Any, Any, Pass]) -> Outcome:
        # Whoever asked may leave; what they asked for is not left half done by that.
        work = self._start(passing)
        try:
            result = await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.cancelled():
                raise Unavailable("the runner is stopping", code="shutting_down") from None
            raise
        if result.error is not None:
            raise result.error
        assert result.plan is not None, "a pass without an error has a plan"
        return Outcome(plan_json(result.plan), result.generation, result.seconds, self._reconciler.drift)
