"""Carries out a plan: prepare what can still be undone, commit in one step, clean up behind.

prepare  open new ports, start new engines and prove them, load new adapters; a failure undoes all of it
commit   switch deployments, publish the directory, update listeners: no await, so no request sees half of it
clean up drain old engines, old adapters, old ports, in the background, up to the drain timeout
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from runner.control.deployment import Deployment, adapter_source
from runner.control.directory import Directory
from runner.control.engine_process import EngineProcess
from runner.control.state_folder import StateFolder
from runner.errors import EngineDied, MlxRunError
from runner.gateway.listener import Listener
from runner.options import Options
from runner.plan.actions import (
    Action,
    CloseListener,
    Disruption,
    MoveListener,
    OpenListener,
    Plan,
    ReplaceModel,
    StartModel,
    StopModel,
    UpdateListener,
    UpdateModel,
)
from runner.plan.planner import Observed
from runner.plan.spec import Desired, ListenerSpec, ModelSpec
from runner.telemetry import GatewayMetrics

logger = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[None]]
Emit = Callable[..., None]


class Live:
    """What is up: the deployments, the listeners, and the directory between them. Written by Executor alone."""

    def __init__(self, folder: StateFolder, options: Options, emit: Emit) -> None:
        self.folder = folder
        self.options = options
        self.emit = emit
        self.directory = Directory()
        self.metrics = GatewayMetrics()
        self.deployments: dict[str, Deployment] = {}
        self.listeners: dict[str, Listener] = {}
        self.created: dict[str, int] = {}
        self.committed: Desired | None = None
        self._background: set[asyncio.Task[None]] = set()

    def observe(self, memory_bytes: int) -> Observed:
        """The specs that are live, for the planner."""
        return Observed(
            models=tuple(d.spec for d in self.deployments.values()),
            listeners=tuple(listener.spec for listener in self.listeners.values()),
            memory_bytes=memory_bytes,
        )

    def publish(self, listeners: tuple[ListenerSpec, ...]) -> None:
        """Let requests see the deployments as they are now."""
        for name in self.deployments:
            self.created.setdefault(name, int(time.time()))
        self.directory.publish(listeners, self.deployments, created=self.created)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run clean-up that nobody waits for; `settle` does."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Wait for the clean-up that is under way."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def shut_down(self, deadline: float) -> None:
        """Drain every port and engine, at the same time, for at most `deadline` seconds."""
        await asyncio.gather(*(listener.close(deadline) for listener in self.listeners.values()))
        await asyncio.gather(*(d.stop(deadline=deadline) for d in self.deployments.values()))
        self.listeners.clear()
        self.deployments.clear()
        await self.settle()


class Executor:
    """Executes one plan on `live`."""

    def __init__(self, live: Live, plan: Plan, desired: Desired) -> None:
        self._live = live
        self._plan = plan
        self._desired = desired
        self._undo: list[Undo] = []
        self._engines: dict[str, EngineProcess] = {}
        self._opened: dict[str, Listener] = {}

    async def execute(self) -> None:
        """Make it so, or leave everything as it was and raise what went wrong.

        Raises MlxRunError: EngineLoadError, EngineDied, ListenerError.
        """
        try:
            await self._prepare()
        except BaseException:
            await self._roll_back()
            raise
        self._commit()

    # ------------------------------------------------------------- prepare

    async def _prepare(self) -> None:
        for action in self._plan.actions:
            if isinstance(action, OpenListener | MoveListener):
                await self._open(action)
        first = self._live.committed is None
        for action in self._plan.actions:
            if isinstance(action, StartModel):
                self._add_deployment(action.spec)
        if first:
            # Nothing serves yet, so early requests may as well find their model and wait for it.
            self._live.publish(self._desired.listeners)
            self._adopt_opened()
        try:
            async with asyncio.TaskGroup() as group:
                for action in self._plan.actions:
                    if isinstance(action, StartModel | ReplaceModel | UpdateModel):
                        group.create_task(self._prepare_model(action))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    def _add_deployment(self, spec: ModelSpec) -> None:
        live = self._live
        deployment = Deployment(spec, live.folder, live.options, live.emit)
        live.deployments[spec.name] = deployment

        async def remove() -> None:
            live.deployments.pop(spec.name, None)
            live.created.pop(spec.name, None)
            await deployment.kill()

        self._undo.append(remove)

    async def _open(self, action: OpenListener | MoveListener) -> None:
        spec = action.spec
        if action.disruption is Disruption.DRAIN:
            assert isinstance(action, MoveListener), "only a port that is held has to be given back"
            await self._close_first(action.old)
        listener = Listener(spec, self._live.directory, self._live.metrics)
        await listener.start()
        self._opened[spec.name] = listener
        self._live.emit("listening", target=action.target, address=f"http://{spec.host}:{spec.port}")

        async def close() -> None:
            # The name may still be held by the listener that this one was to replace: that one stays.
            if self._live.listeners.get(spec.name) is listener:
                del self._live.listeners[spec.name]
            await listener.close(0.0)

        self._undo.append(close)

    async def _close_first(self, old: ListenerSpec) -> None:
        await _close(self._live.listeners.pop(old.name), self._live.options.drain_timeout)

        async def reopen() -> None:
            listener = Listener(old, self._live.directory, self._live.metrics)
            await listener.start()
            self._live.listeners[old.name] = listener

        self._undo.append(reopen)

    def _adopt_opened(self) -> None:
        self._live.listeners.update(self._opened)

    async def _prepare_model(self, action: StartModel | ReplaceModel | UpdateModel) -> None:
        self._live.emit("action_started", target=action.target, reason=action.reason)
        started = time.monotonic()
        if isinstance(action, UpdateModel):
            await self._load_adapters(action)
        else:
            await self._bring_up(action)
        seconds = round(time.monotonic() - started, 3)
        self._live.emit("action_done", target=action.target, disruption=str(action.disruption), seconds=seconds)

    async def _bring_up(self, action: StartModel | ReplaceModel) -> None:
        spec = action.spec
        deployment = self._live.deployments[spec.name]
        if isinstance(action, ReplaceModel) and action.disruption is Disruption.DRAIN:
            await deployment.park()
            self._undo.append(partial(_restore, deployment, action.old))
        engine = await deployment.bring_up(spec)
        self._undo.append(engine.kill)
        if self._live.committed is None:
            deployment.switch(spec, engine)  # serve each model as soon as it is there
        else:
            self._engines[spec.name] = engine

    async def _load_adapters(self, action: UpdateModel) -> None:
        engine = self._live.deployments[action.spec.name].engine
        if engine is None:
            # It is coming back from a crash, and does so with whatever spec is current by then.
            return
        for adapter in action.load:
            try:
                await engine.load_adapter(adapter_source(adapter))
            except EngineDied:
                return
            self._undo.append(partial(_drop_adapter, engine, adapter.key))

    async def _roll_back(self) -> None:
        for undo in reversed(self._undo):
            try:
                await asyncio.shield(undo())
            except MlxRunError as error:
                logger.error("undoing a failed plan did not succeed", extra={"error": str(error)})
        if self._live.committed is not None:
            self._live.publish(self._live.committed.listeners)

    # ------------------------------------------------------------- commit

    def _commit(self) -> None:
        live = self._live
        retire: list[Coroutine[Any, Any, None]] = []
        for action in self._plan.actions:
            retire += self._commit_action(action)
        self._adopt_opened()
        live.publish(self._desired.listeners)
        live.committed = self._desired
        for work in retire:
            live.in_background(work)

    def _commit_action(self, action: Action) -> list[Coroutine[Any, Any, None]]:
        """Switch over. Returns the clean-up it leaves."""
        live, timeout = self._live, self._live.options.drain_timeout
        name = action.spec.name
        match action:
            case StartModel() | ReplaceModel():
                if name in self._engines:
                    old = live.deployments[name].switch(action.spec, self._engines[name])
                    return [old.drain(timeout)] if old else []
            case UpdateModel():
                deployment = live.deployments[name]
                deployment.adopt(action.spec)
                if deployment.engine is not None:
                    return [_drop_adapter(deployment.engine, a.key) for a in action.drop]
            case StopModel():
                live.created.pop(name, None)
                return [live.deployments.pop(name).stop()]
            case MoveListener() | CloseListener():
                closing = live.listeners.pop(name, None)  # None: it had to give its port back before
                return [_close(closing, timeout)] if closing else []
            case UpdateListener():
                live.listeners[name].update(action.spec)
            case _:
                pass
        return []


async def _restore(deployment: Deployment, old: ModelSpec) -> None:
    deployment.switch(old, await deployment.bring_up(old))


async def _close(listener: Listener, deadline: float) -> None:
    cut = await listener.close(deadline)
    if cut:
        logger.warning("requests were cut at the drain deadline", extra={"listener": listener.spec.name, "count": cut})


async def _drop_adapter(engine: EngineProcess, key: str) -> None:
    try:
        await engine.drop_adapter(key)
    except EngineDied:
        return  # an engine that is gone holds no adapters


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf of the group: one clear reason beats a tree of them."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
