"""Carries out a plan: prepare what can still be undone, commit in one step, clean up behind.

prepare  open new ports, end what has to make room, start new engines and prove them, load new adapters; a failure
         undoes all of it
record   the generation is written, so that whatever ends the runner from here on, it is known what was to be live
commit   switch deployments, publish the directory, update listeners: no await, so no request sees half of it
clean up drain old engines, old adapters, old ports, in the background, up to the drain timeout
"""

from __future__ import annotations

import asyncio
import contextlib
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
from runner.errors import EngineDied, SourceChanged
from runner.gateway.listener import Listener
from runner.plan.actions import (
    Action,
    CloseListener,
    Disruption,
    MoveListener,
    OpenListener,
    Plan,
    RenameModel,
    ReplaceModel,
    StartModel,
    StopModel,
    UpdateListener,
    UpdateModel,
)
from runner.plan.render import VERBS
from runner.plan.spec import Desired
from runner.plan.verify import Changed

logger = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[None]]
CleanUp = Callable[[], Coroutine[Any, Any, None]]


class Executor:
    """Executes one plan on `live`."""

    def __init__(self, live: Live, plan: Plan, desired: Desired) -> None:
        self._live = live
        self._plan = plan
        self._desired = desired
        self._first = live.committed is None
        self._undo: list[Undo] = []
        self._bring_back: list[Undo] = []
        self._engines: dict[str, EngineProcess] = {}
        self._opened: dict[str, Listener] = {}
        self._renamed: dict[str, Deployment] = {}
        self._told: set[tuple[str, str]] = set()

    async def execute(self, record: Callable[[], Awaitable[None]]) -> None:
        """Make it so, or leave everything as it was and raise what went wrong.

        `record` is awaited once everything is proven and before anything is switched over; from there on cancelling
        comes too late. Raises MlxRunError, such as EngineLoadError, EngineDied, ListenerError, and what `record`
        raises.
        """
        assert not self._desired.downloads, "what is not there yet cannot be carried out"
        self._live.room.limit = self._desired.memory_limit_bytes
        try:
            await self._prepare()
            self._require_life()
            await _to_the_end(record())
            clean_up = self._commit()
        except BaseException:
            await _to_the_end(self._roll_back())
            raise
        for work in clean_up:
            self._live.in_background(work())

    # ------------------------------------------------------------- prepare

    async def _prepare(self) -> None:
        for action in self._plan.actions:
            if isinstance(action, OpenListener | MoveListener) and not _stays(action):
                await self._open(action)
        for action in self._plan.actions:
            if isinstance(action, StartModel):
                self._add_deployment(action)
        if self._first:
            # Nothing serves yet, so early requests may as well find their model and wait for it.
            self._live.deployments.update(self._live.coming)
            self._live.publish(self._desired.listeners)
            self._live.listeners.update(self._opened)
        await _all(self._make_room(action) for action in self._plan.actions if _ends_first(action))
        await _all(
            self._prepare_model(action)
            for action in self._plan.actions
            if isinstance(action, StartModel | ReplaceModel | UpdateModel)
        )
        for action in self._plan.actions:  # last: until then clients are served as they were
            if isinstance(action, MoveListener) and _stays(action):
                await self._open(action)

    async def _open(self, action: OpenListener | MoveListener) -> None:
        live = self._live
        self._began(action)
        sock = None
        if isinstance(action, MoveListener) and (_stays(action) or action.disruption is Disruption.DRAIN):
            old = live.listeners.pop(action.old.name)
            self._undo.append(partial(reopen_listener, live, action.old))
            if _stays(action):
                sock = old.hand_over()
            else:
                await old.release()
            live.in_background(close_listener(live, old))
        listener = await open_listener(live, action.spec, sock)
        self._opened[action.spec.name] = listener
        self._done(action)

        async def close() -> None:
            # The name may still be held by the listener that this one was to replace: that one stays.
            if live.listeners.get(action.spec.name) is listener:
                del live.listeners[action.spec.name]
            await listener.close(0.0)

        self._undo.append(close)

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
        self._began(action)
        old = action.old if isinstance(action, ReplaceModel) else action.spec
        deployment = self._live.deployments[old.name]
        # Noted first: a park that is interrupted has to be undone too.
        self._bring_back.append(partial(deployment.unpark, old))
        await deployment.park()

    async def _prepare_model(self, action: StartModel | ReplaceModel | UpdateModel) -> None:
        started = time.monotonic()
        self._began(action)
        if isinstance(action, UpdateModel):
            if action.old.load == "on_demand" and action.spec.load == "eager":
                await self._live.deployments[action.old.name].be_loaded()
            await self._load_adapters(action)
            _require_same(await self._live.sources.changed_adapters(action.spec.name, action.load))
        else:
            await self._bring_up(action)
            self._done(action, seconds=time.monotonic() - started)

    async def _bring_up(self, action: StartModel | ReplaceModel) -> None:
        spec = action.spec
        deployments = self._live.coming if isinstance(action, StartModel) else self._live.deployments
        if spec.load == "on_demand":
            if self._first:
                deployments[spec.name].rest(spec)  # requests may load it already
            return
        engine = await deployments[spec.name].bring_up(spec)
        self._undo.append(engine.kill)
        _require_same(await self._live.sources.changed([spec]))
        if self._first:
            deployments[spec.name].switch(spec, engine)  # serve each model as soon as it is there
        else:
            self._engines[spec.name] = engine

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
            self._undo.append(partial(_drop_adapter, engine, adapter.key))

    def _require_life(self) -> None:
        """Raises EngineDied where an engine ended while others were still being brought up."""
        for name, engine in self._engines.items():
            if not engine.alive:
                raise EngineDied(
                    f"the engine of {name} ended while others were loading", hint=f"Its output: `mlx-run logs {name}`."
                )

    async def _roll_back(self) -> None:
        """Undo in reverse, and then bring back what had made room: its memory is free by then."""
        for undo in reversed(self._undo):
            await _attempt(undo)
        if not self._live.closing:
            await asyncio.gather(*(_attempt(undo) for undo in self._bring_back))
        if self._live.committed is not None:
            self._live.room.limit = self._live.committed.memory_limit_bytes
            self._live.publish(self._live.committed.listeners)

    # ------------------------------------------------------------- commit

    def _commit(self) -> list[CleanUp]:
        """Switch over, all or nothing. Returns the clean-up that is left to do."""
        live = self._live
        before = live.remember()
        clean_up: list[CleanUp] = []
        try:
            for action in self._plan.actions:  # names that are given up are free for others
                clean_up += self._withdraw(action)
            for action in self._plan.actions:
                clean_up += self._switch(action)
            live.listeners.update(self._opened)
            live.publish(self._desired.listeners)
            live.committed = self._desired
        except BaseException:
            live.restore(before)
            raise
        live.coming.clear()
        for action in self._plan.actions:
            self._done(action)
        return [*clean_up, self._rename_engines]

    async def _rename_engines(self) -> None:
        """So that a later runner finds them under their new names, and their logs go on there."""
        names = {deployment.engine.spec.model: name for name, deployment in self._renamed.items() if deployment.engine}
        try:
            for name, deployment in self._renamed.items():
                if deployment.engine is not None:
                    deployment.engine.rename(name)
            self._live.folder.rename_engine_logs(names)
        except OSError as error:
            logger.warning("an engine keeps its old name in the state folder", extra={"error": str(error)})

    def _withdraw(self, action: Action) -> list[CleanUp]:
        live, name = self._live, action.spec.name
        match action:
            case StopModel():
                live.created.pop(name, None)
                return [live.deployments.pop(name).stop]
            case RenameModel():
                self._renamed[name] = live.deployments.pop(action.old.name)
                live.created[name] = live.created.pop(action.old.name, int(time.time()))
            case MoveListener() | CloseListener():
                closing = live.listeners.pop(name, None)  # None: it had to give its port back before
                return [partial(close_listener, live, closing)] if closing else []
            case _:
                pass
        return []

    def _switch(self, action: Action) -> list[CleanUp]:
        live, name = self._live, action.spec.name
        match action:
            case StartModel() | ReplaceModel():
                if isinstance(action, StartModel):
                    live.deployments[name] = live.coming[name]
                if action.spec.load == "on_demand" and not self._first:
                    old = live.deployments[name].rest(action.spec)
                    return [partial(old.drain, live.options.drain_timeout)] if old else []
                if name in self._engines:
                    old = live.deployments[name].switch(action.spec, self._engines[name])
                    return [partial(old.drain, live.options.drain_timeout)] if old else []
            case UpdateModel():
                if isinstance(action, RenameModel):
                    live.deployments[name] = self._renamed[name]
                deployment = live.deployments[name]
                deployment.adopt(action.spec)
                if deployment.engine is not None:
                    return [partial(_drop_adapter, deployment.engine, a.key) for a in action.drop]
            case UpdateListener():
                live.listeners[name].update(action.spec)
            case _:
                pass
        return []

    # ------------------------------------------------------------- telling

    def _began(self, action: Action) -> None:
        self._live.emit("action_started", action=VERBS[type(action)], target=action.target, reason=action.reason)

    def _done(self, action: Action, seconds: float = 0.0) -> None:
        """Said once of each action, when it is done: of those that can be undone until the commit, then."""
        verb = VERBS[type(action)]
        if (verb, action.target) not in self._told:
            self._told.add((verb, action.target))
            self._live.emit(
                "action_done",
                action=verb,
                target=action.target,
                disruption=str(action.disruption),
                seconds=round(seconds, 3),
            )


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


async def _to_the_end(work: Awaitable[None]) -> None:
    """Wait for what must not be left half done; being cancelled meanwhile changes nothing."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


async def _attempt(undo: Undo) -> None:
    try:
        await undo()
    except Exception:
        logger.exception("undoing a failed plan did not succeed")


async def _drop_adapter(engine: EngineProcess, key: str) -> None:
    try:
        await engine.drop_adapter(key)
    except EngineDied:
        return  # an engine that is gone holds no adapters
