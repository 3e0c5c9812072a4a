"""The second part of carrying out a plan: in one step, without an await, so that no request sees half of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from runner.control.deployment import Deployment
from runner.control.live import Live
from runner.control.ports import close_listener
from runner.control.preparation import Preparation, drop_adapter
from runner.control.progress import Progress
from runner.plan.actions import (
    Action,
    CloseListener,
    MoveListener,
    Plan,
    RenameModel,
    ReplaceModel,
    StartModel,
    StopModel,
    UpdateListener,
    UpdateModel,
)
from runner.plan.spec import Desired

logger = logging.getLogger(__name__)

CleanUp = Callable[[], Coroutine[Any, Any, None]]


class Commit:
    """Switches `live` to what was prepared."""

    def __init__(self, live: Live, plan: Plan, desired: Desired, prepared: Preparation, progress: Progress) -> None:
        self._live = live
        self._plan = plan
        self._desired = desired
        self._prepared = prepared
        self._progress = progress
        self._renamed: dict[str, Deployment] = {}

    def switch_over(self) -> list[CleanUp]:
        """All or nothing. Returns the clean-up that is left to do."""
        live = self._live
        before = live.remember()
        clean_up: list[CleanUp] = []
        try:
            for action in self._plan.actions:  # names that are given up are free for others
                clean_up += self._withdraw(action)
            for action in self._plan.actions:
                clean_up += self._switch(action)
            live.listeners.update(self._prepared.opened)
            live.publish(self._desired.listeners)
            live.committed = self._desired
        except BaseException:
            live.restore(before)
            raise
        live.coming.clear()
        for action in self._plan.actions:
            self._progress.done(action)
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
                if action.spec.load == "on_demand" and not self._prepared.first:
                    old = live.deployments[name].rest(action.spec)
                    return [partial(old.drain, live.options.drain_timeout)] if old else []
                if name in self._prepared.engines:
                    old = live.deployments[name].switch(action.spec, self._prepared.engines[name])
                    return [partial(old.drain, live.options.drain_timeout)] if old else []
            case UpdateModel():
                if isinstance(action, RenameModel):
                    live.deployments[name] = self._renamed[name]
                deployment = live.deployments[name]
                deployment.adopt(action.spec)
                if deployment.engine is not None:
                    return [partial(drop_adapter, deployment.engine, a.key) for a in action.drop]
            case UpdateListener():
                live.listeners[name].update(action.spec)
            case _:
                pass
        return []
