"""The actions a plan is made of. Each says what it touches, why, and who notices; none of them does anything.

`runner.control.executor` carries them out, `runner.plan.render` prints them: both see the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from runner.plan.spec import AdapterSpec, ListenerSpec, ModelSpec


class Disruption(StrEnum):
    """Who notices an action."""

    NONE = "in place"
    START = "start"
    SURGE = "surge"
    DRAIN = "drain then start"
    STOP = "drain then stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAction:
    """Something to do with one deployment. `spec` is what is wanted of it, or for a stop what it was."""

    spec: ModelSpec
    reason: str
    disruption: Disruption

    @property
    def target(self) -> str:
        """Dotted path of what is touched, as in the manifest."""
        return f"models.{self.spec.name}"

    @property
    def memory_delta(self) -> int:
        """Bytes of weights in memory after, less those before."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModel(ModelAction):
    """Bring up an engine for a deployment that has none."""

    disruption: Disruption = Disruption.START

    @property
    def memory_delta(self) -> int:
        """All of them are new."""
        return self.spec.weights_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceModel(ModelAction):
    """Bring up an engine of the new spec and retire the old one.

    SURGE starts the new one beside the old, so both are held meanwhile; DRAIN stops the old one first, and requests
    wait.
    """

    old: ModelSpec

    @property
    def memory_delta(self) -> int:
        """Once the old engine is gone."""
        return self.spec.weights_bytes - self.old.weights_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateModel(ModelAction):
    """Change a running deployment in place. `load` and `drop` are adapters that come and go in the engine."""

    old: ModelSpec
    load: tuple[AdapterSpec, ...]
    drop: tuple[AdapterSpec, ...]
    disruption: Disruption = Disruption.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class StopModel(ModelAction):
    """Drain a deployment's engine and stop it; requests for it get 404."""

    disruption: Disruption = Disruption.STOP

    @property
    def memory_delta(self) -> int:
        """All of them are given back."""
        return -self.spec.weights_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerAction:
    """Something to do with one port. `spec` is what is wanted of it, or for a close what it was."""

    spec: ListenerSpec
    reason: str
    disruption: Disruption

    @property
    def target(self) -> str:
        """Dotted path of what is touched, as in the manifest."""
        return f"servers.{self.spec.name}"

    @property
    def memory_delta(self) -> int:
        """Ports hold no weights."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenListener(ListenerAction):
    """Open a port."""

    disruption: Disruption = Disruption.START


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveListener(ListenerAction):
    """Open the new address, then drain the old one; the other way round (DRAIN) when both are one port."""

    old: ListenerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateListener(ListenerAction):
    """Change a listener that keeps its socket: which models, which keys, CORS."""

    old: ListenerSpec
    disruption: Disruption = Disruption.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseListener(ListenerAction):
    """Drain a port and close it."""

    disruption: Disruption = Disruption.STOP


Action = ModelAction | ListenerAction


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to happen, in the order it is printed. Empty when observed equals desired."""

    name: str
    actions: tuple[Action, ...]
    unchanged: tuple[str, ...]
    weights_before: int
    weights_after: int

    @property
    def empty(self) -> bool:
        """Whether nothing has to be done."""
        return not self.actions
