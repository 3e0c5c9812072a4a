"""`Loaded`, `Ready` and `Degraded` of a deployment: how its engine stands, and whether it is as it should be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from runner.control.conditions import Conditions, Status

_AWAY: Final[dict[str, str]] = {
    "pending": "NotStarted",
    "loading": "Loading",
    "idle": "Idle",
    "backoff": "BackingOff",
    "replacing": "MakingRoom",
    "stopped": "Stopped",
}
"""Why there is no engine, by the deployment's state."""


class Health:
    """Written by its deployment. `stable` is how many seconds an engine has to stay up after a crash to count as
    well."""

    def __init__(self, target: Callable[[], str], emit: Callable[..., None], stable: float) -> None:
        self.conditions = Conditions(
            target,
            emit,
            {"Loaded": ("false", "NotStarted"), "Ready": ("false", "NotStarted"), "Degraded": ("false", "AsDeclared")},
        )
        self._stable = stable
        self._behind = ""
        self._changed = ""
        self._died = ""
        self._recovery: asyncio.TimerHandle | None = None

    def follow(self, state: str, error: str, *, adopted: bool, on_demand: bool = False) -> None:
        """The deployment's state, and what last went wrong with it. `on_demand`: not being loaded is not
        unusual."""
        if on_demand and state in ("idle", "loading", "replacing") and not error:
            self.conditions.set("Loaded", "false", _AWAY[state])
            self.conditions.set("Ready", "true", "LoadsOnDemand")
        elif state == "ready":
            self.conditions.set("Loaded", "true", "Adopted" if adopted else "WeightsInMemory")
            self.conditions.set("Ready", "true", "GeneratedToken")
        else:
            reason, message = _AWAY[state], error if state in ("backoff", "idle") else ""
            self.conditions.set("Loaded", "false", reason, message)
            self.conditions.set("Ready", "false", reason, message)
        if state == "stopped":
            self._forget()
        self._judge()

    def died(self, reason: str) -> None:
        """The engine ended by itself."""
        self._forget()
        self._died = reason
        self._judge()

    def came_back(self) -> None:
        """Another engine serves what the one that died did."""
        self._recovery = asyncio.get_running_loop().call_later(self._stable, self.recovered)
        self._judge()

    def recovered(self) -> None:
        """What died is forgotten: it stayed up for long enough, or another was planned."""
        self._forget()
        self._died = ""
        self._judge()

    def behind(self, reason: str) -> None:
        """What the manifest wants of it is not in effect, and why; empty when it is."""
        self._behind = reason
        self._judge()

    def sources_changed(self, what: str) -> None:
        """It was loaded from other files than were planned; empty when it was not."""
        self._changed = what
        self._judge()

    def _judge(self) -> None:
        status: Status = "true"
        if self._died:
            reason, message = ("RecentlyRestarted" if self._recovery else "EngineDied"), self._died
        elif self._changed:
            reason, message = "SourceChanged", self._changed
        elif self._behind:
            reason, message = "EditNotInEffect", self._behind
        else:
            status, reason, message = "false", "AsDeclared", ""
        self.conditions.set("Degraded", status, reason, message)

    def _forget(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None

    @property
    def as_json(self) -> dict[str, dict[str, Any]]:
        """By type, as plain data."""
        return self.conditions.as_json
