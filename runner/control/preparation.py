"""The first part of carrying out a plan: whatever can still be undone, with its undoing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from runner.control.deployment import Deployment
from runner.control.engine_process import EngineProcess
from runner.control.engine_spec import adapter_source
from runner.control.live import Live
from runner.control.ports import close_listener, open_listener, reopen_listener
from runner.control.progress import Progress
from runner.errors import EngineDied, SourceChanged
from runner.gateway.listener import Listener
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
    UpdateModel,
)
from runner.plan.spec import Desired, ListenerSpec
from runner.plan.verify import Changed

logger = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[None]]


class Preparation:
    """Opens ports, makes room, starts `engines` and proves them, loads adapters.

    `first`: nothing is served yet, so that ports and models are published as they come; `opened` are the listeners.
    """

    def __init__(self, live: Live, plan: Plan, desired: Desired, progress: Progress) -> None:
        self.first = live.committed is None
        self.engines: dict[str, EngineProcess] = {}
        self.opened: dict[str, Listener] = {}
        self._live = live
        self._plan = plan
        self._desired = desired
        self._progress = progress
        self._undo: list[Undo] = []
        self._bring_back: list[Undo] = []

    async def prepare(self) -> None:
        """Do all of it. Raises MlxRunError; whatever happens, `undo` takes back what was done until then."""
        late = self._late()
        for action in self._plan.actions:
            if isinstance(action, OpenListener | MoveListener) and action not in late:
                await self._open(action)
        for action in self._plan.actions:
            if isinstance(action, StartModel):
                self._add_deployment(action)
        if self.first:
            # Nothing serves yet, so early requests may as well find their model and wait for it.
            self._live.deployments.update(self._live.coming)
            self._live.publish(self._desired.listeners)
            self._live.listeners.update(self.opened)
        await _all(self._make_room(action) for action in self._plan.actions if _ends_first(action))
        await _all(
            self._prepare_model(action)
            for action in self._plan.actions
            if isinstance(action, StartModel | ReplaceModel | UpdateModel)
        )
        for action in self._plan.actions:
            if isinstance(action, MoveListener | CloseListener) and action.heir:
                await self._give_back(action.old if isinstance(action, MoveListener) else action.spec)
        for action in late:
            await self._open(action)

    def _late(self) -> list[OpenListener | MoveListener]:
        """What takes over an address, or a port that another server has. It is done last: until then clients are served
        as they were."""
        left = [action for action in self._plan.actions if isinstance(action, MoveListener | CloseListener)]
        ports = {(a.old if isinstance(a, MoveListener) else a.spec).port for a in left if a.heir}
        opening = [action for action in self._plan.actions if isinstance(action, OpenListener | MoveListener)]
        return [action for action in opening if _stays(action) or action.spec.port in ports]

    async def _open(self, action: OpenListener | MoveListener) -> None:
        live = self._live
        self._progress.began(action)
        sock = None
        if isinstance(action, MoveListener) and _stays(action):
            old = live.listeners.pop(action.old.name)
            self._undo.append(partial(reopen_listener, live, action.old))
            sock = old.hand_over()
            live.in_background(close_listener(live, old))
        elif isinstance(action, MoveListener) and action.disruption is Disruption.DRAIN and not action.heir:
            await self._give_back(action.old)
        listener = await open_listener(live, action.spec, sock)
        self.opened[action.spec.name] = listener
        self._progress.done(action)

        async def close() -> None:
            # The name may still be held by the listener that this one was to replace: that one stays.
            if live.listeners.get(action.spec.name) is listener:
                del live.listeners[action.spec.name]
            await listener.close(0.0)

        self._undo.append(close)

    async def _give_back(self, spec: ListenerSpec) -> None:
        """Have a listener give its port back; its requests finish beside the one that gets it."""
        old = self._live.listeners.pop(spec.name)
        self._undo.append(partial(reopen_listener, self._live, spec))
        try:
            await old.release()
        finally:
            self._live.in_background(close_listener(self._live, old))

    def _add_deployment(self, action: StartModel) -> None:
        live, name = self._live, action.spec.name
        deployment = live.coming[name] = Deployment(action.spec, live.folder, live.options, live.emit, live.room)

        async def remove() -> None:
            live.coming.pop(name, None)
            if live.deployments.get(name) is deployment:
                del live.deployments[name]
                live.created.pop(name, None)
            await deployment.kill()

        self._undo.append(remove)

    async def _make_room(self, action: Action) -> None:
        assert isinstance(action, ReplaceModel | StopModel), "nothing else holds memory"
        self._progress.began(action)
        old = action.old if isinstance(action, ReplaceModel) else action.spec
        deployment = self._live.deployments[old.name]
        # Noted first: a park that is interrupted has to be undone too.
        self._bring_back.append(partial(deployment.unpark, old))
        await deployment.park()

    async def _prepare_model(self, action: StartModel | ReplaceModel | UpdateModel) -> None:
        started = time.monotonic()
        self._progress.began(action)
        if isinstance(action, UpdateModel):
            if action.old.load == "on_demand" and action.spec.load == "eager":
                await self._live.deployments[action.old.name].be_loaded()
            await self._load_adapters(action)
            _require_same(await self._live.sources.changed_adapters(action.spec.name, action.load))
        else:
            await self._bring_up(action)
            self._progress.done(action, seconds=time.monotonic() - started)

    async def _bring_up(self, action: StartModel | ReplaceModel) -> None:
        spec = action.spec
        deployments = self._live.coming if isinstance(action, StartModel) else self._live.deployments
        deployment = deployments[spec.name]
        if spec.load == "on_demand":
            if self.first:
                deployment.rest(spec)  # requests may load it already
            return
        engine = await deployment.bring_up(spec)
        self._undo.append(partial(_end_unless_served, deployment, engine))
        _require_same(await self._live.sources.changed([spec]))
        if self.first:
            old = deployment.switch(spec, engine)  # serve each model as soon as it is there
            if old is not None:  # adopted before a try that failed
                self._live.in_background(old.drain(self._live.options.drain_timeout))
        else:
            self.engines[spec.name] = engine

    async def _load_adapters(self, action: UpdateModel) -> None:
        engine = self._live.deployments[action.old.name].engine
        if engine is None:
            # It is coming back from a crash, and does so with whatever spec is current by then.
            return
        for adapter in action.load:
            try:
                await engine.load_adapter(adapter_source(adapter))
            except EngineDied:
                return
            self._undo.append(partial(drop_adapter, engine, adapter.key))

    def require_life(self) -> None:
        """Raises EngineDied where an engine ended while others were still being brought up."""
        for name, engine in self.engines.items():
            if not engine.alive:
                raise EngineDied(
                    f"the engine of {name} ended while others were loading", hint=f"Its output: `mlx-run logs {name}`."
                )

    async def undo(self) -> None:
        """Everything in reverse, and then bring back what had made room: its memory is free by then."""
        for undo in reversed(self._undo):
            await _attempt(undo)
        if not self._live.closing:
            await asyncio.gather(*(_attempt(undo) for undo in self._bring_back))
        if self._live.committed is not None:
            self._live.room.limit = self._live.committed.memory_limit_bytes
            self._live.room.share()
            self._live.publish(self._live.committed.listeners)


def _require_same(changed: list[Changed]) -> None:
    """Raises SourceChanged where what an engine has just read is not what was planned."""
    if changed:
        raise SourceChanged("files changed while they were loaded:\n" + "\n".join(map(str, changed)))


def _stays(action: OpenListener | MoveListener) -> bool:
    """Whether the address is the one that it was, and only what is spoken there changes."""
    return isinstance(action, MoveListener) and action.old.address == action.spec.address


def _ends_first(action: Action) -> bool:
    if isinstance(action, StopModel):
        return action.first
    return isinstance(action, ReplaceModel) and action.disruption is Disruption.DRAIN


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run side by side; the first failure ends the others, and is raised alone: one clear reason beats a tree."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        error: BaseException = failures
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def _attempt(undo: Undo) -> None:
    try:
        await undo()
    except Exception:
        logger.exception("undoing a failed plan did not succeed")


async def _end_unless_served(deployment: Deployment, engine: EngineProcess) -> None:
    """One that is served ends with its deployment: killed here it would count as having died, and be brought back."""
    if deployment.engine is not engine:
        await engine.kill()


async def drop_adapter(engine: EngineProcess, key: str) -> None:
    """No new rows for it; an engine that is gone holds none."""
    try:
        await engine.drop_adapter(key)
    except EngineDied:
        return
