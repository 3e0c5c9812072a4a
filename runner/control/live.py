"""What is up: the deployments, the listeners, and the directory between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from runner.control.backstop import Backstop
from runner.control.conditions import Wanted
from runner.control.deployment import Deployment, Standing
from runner.control.directory import Directory
from runner.control.model_status import absent, status_of
from runner.control.room import Room
from runner.control.sources import Sources
from runner.control.state_folder import StateFolder
from runner.gateway.admin.control import Control
from runner.gateway.listener import Listener
from runner.hub.cache import commit_of
from runner.options import Options
from runner.plan.planner import Observed
from runner.plan.spec import Desired, ListenerSpec, ModelSpec
from runner.telemetry import GatewayMetrics

Emit = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Before:
    """Everything that a commit writes, as it was."""

    deployments: Mapping[str, tuple[Deployment, Standing]]
    listeners: Mapping[str, tuple[Listener, ListenerSpec]]
    created: Mapping[str, int]
    committed: Desired | None


class Live:
    """Written by `runner.control.executor.Executor` and its parts alone, adoption at the start apart.

    `admin` is what listeners with the admin API ask. `closing`: all of it is about to be shut down. `wanted` is what
    the reconciler knows of the manifest's models. `coming` are deployments that a plan is starting and that nobody is
    routed to yet, `leaving` are ports that closed listeners give back in a moment, `draining` are those listeners until
    their last request has ended.
    """

    def __init__(self, folder: StateFolder, options: Options, emit: Emit) -> None:
        self.folder = folder
        self.options = options
        self.emit = emit
        self.wanted = Wanted(emit)
        self.sources = Sources()
        self.directory = Directory()
        self.admin: Control | None = None
        self.metrics = GatewayMetrics()
        self.backstop = Backstop(folder, wanted=options.cgroups)
        self.room = Room(self._tenants, options.load_wait, emit, self.backstop)
        self.deployments: dict[str, Deployment] = {}
        self.coming: dict[str, Deployment] = {}
        self.listeners: dict[str, Listener] = {}
        self.leaving: dict[int, asyncio.Event] = {}
        self.draining: set[Listener] = set()
        self.created: dict[str, int] = {}
        self.committed: Desired | None = None
        self.closing = False
        self._background: set[asyncio.Task[None]] = set()
        self._attempts: set[asyncio.Task[None]] = set()

    def _tenants(self) -> list[Deployment]:
        return [*self.deployments.values()]

    def observe(self, memory_bytes: int) -> Observed:
        """The specs that are live, for the planner."""
        return Observed(
            models=tuple(d.spec for d in self.deployments.values()),
            listeners=tuple(listener.spec for listener in self.listeners.values()),
            memory_bytes=memory_bytes,
        )

    def model_statuses(self, resting: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Every model that is served, coming, wanted, or `resting`."""
        served = {name: status_of(d) for name, d in (*self.coming.items(), *self.deployments.items())}
        served |= {name: absent(name) for name in (*self.wanted.names, *resting) if name not in served}
        specs = {name: d.spec for name, d in (*self.coming.items(), *self.deployments.items())}
        for name, status in served.items():
            if name in resting:
                status["state"] = "unloaded"
            status["commits"] = _commits(specs[name]) if name in specs else {}
            status["conditions"] = {**self.wanted.of(name).as_json, **status["conditions"]}
        return list(served.values())

    def publish(self, listeners: tuple[ListenerSpec, ...]) -> None:
        """Let requests see the deployments as they are now."""
        for name in self.deployments:
            self.created.setdefault(name, int(time.time()))
        self.directory.publish(listeners, self.deployments, created=self.created)

    # ------------------------------------------------------------- a commit that fails halfway

    def remember(self) -> Before:
        """What `restore` goes back to."""
        return Before(
            {name: (deployment, deployment.standing) for name, deployment in self.deployments.items()},
            {name: (listener, listener.spec) for name, listener in self.listeners.items()},
            dict(self.created),
            self.committed,
        )

    def restore(self, before: Before) -> None:
        """Everything as it was; as no await lay in between, nobody has seen it otherwise."""
        self.deployments = {name: deployment for name, (deployment, _) in before.deployments.items()}
        for deployment, standing in before.deployments.values():
            deployment.reset(standing)
        self.listeners = {name: listener for name, (listener, _) in before.listeners.items()}
        for listener, spec in before.listeners.values():
            if listener.spec != spec:
                listener.update(spec)
        self.created = dict(before.created)
        self.committed = before.committed
        if self.committed is not None:
            self.publish(self.committed.listeners)

    # ------------------------------------------------------------- what nobody waits for

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run clean-up that nobody waits for; `settle` does."""
        _run(work, self._background)

    def keep_trying(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what goes on until it succeeds; shutting down ends it."""
        _run(work, self._attempts)

    def begin_closing(self) -> None:
        """All of it is about to be shut down: what is being started, or brought back, is not waited for."""
        self.closing = True
        for deployment in (*self.coming.values(), *self.deployments.values()):
            self.in_background(deployment.starting.abandon())

    async def settle(self) -> None:
        """Wait for the clean-up that is under way."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def shut_down(self, deadline: float) -> None:
        """Drain everything for at most `deadline` seconds, and forget it."""
        for attempt in self._attempts:
            attempt.cancel()
        await self.drain(deadline)
        self.listeners.clear()
        self.deployments.clear()
        await self.settle()
        await self.backstop.close()

    async def drain(self, deadline: float) -> None:
        """Drain every port and engine, at the same time, for at most `deadline` seconds: also those that an edit
        before, or another call, gave more."""
        await asyncio.gather(*(listener.close(deadline) for listener in (*self.listeners.values(), *self.draining)))
        stopping = [d.stop(deadline=deadline) for d in self.deployments.values()]
        await asyncio.gather(*stopping, *(engine.drain(deadline) for engine in self.room.engines))


def _run(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _commits(spec: ModelSpec) -> dict[str, str]:
    """Which commits of hub repositories a model, its draft and its adapters are; folders have none."""
    folders = {"model": spec.path} | ({"draft": spec.draft.path} if spec.draft is not None else {})
    folders |= {f"adapters.{adapter.name}": adapter.path for adapter in spec.adapters}
    return {what: commit for what, folder in folders.items() if (commit := commit_of(folder))}
