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


@dataclass(frozen=True, slots=True)
class StartModel:
    """Bring up an engine for a deployment that has none."""

    spec: ModelSpec
    reason: str
    disruption: Disruption = Disruption.START

    @property
    def target(self) -> str:
        """Dotted path of what is touched, as in the manifest."""
        return f"models.{self.spec.name}"

    @property
    def memory_delta(self) -> int:
        """Bytes of weights that come on top while and after this runs."""
        return self.spec.weights_bytes


@dataclass(frozen=True, slots=True)
class ReplaceModel:
    """Bring up an engine of the new spec and retire the old one.

    SURGE starts the new one beside the old; DRAIN stops the old one first, and requests wait meanwhile.
    """

    old: ModelSpec
    new: ModelSpec
    reason: str
    disruption: Disruption

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"models.{self.new.name}"

    @property
    def memory_delta(self) -> int:
        """Bytes of weights after minus before; during a surge both are held."""
        return self.new.weights_bytes - self.old.weights_bytes


@dataclass(frozen=True, slots=True)
class UpdateModel:
    """Change a running deployment in place. `load` and `drop` are adapters that come and go in the engine."""

    old: ModelSpec
    new: ModelSpec
    load: tuple[AdapterSpec, ...]
    drop: tuple[AdapterSpec, ...]
    reason: str
    disruption: Disruption = Disruption.NONE
    memory_delta: int = 0

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"models.{self.new.name}"


@dataclass(frozen=True, slots=True)
class StopModel:
    """Drain a deployment's engine and stop it; requests for it get 404."""

    spec: ModelSpec
    reason: str
    disruption: Disruption = Disruption.STOP

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"models.{self.spec.name}"

    @property
    def memory_delta(self) -> int:
        """Bytes of weights that are given back."""
        return -self.spec.weights_bytes


@dataclass(frozen=True, slots=True)
class OpenListener:
    """Open a port."""

    spec: ListenerSpec
    reason: str
    disruption: Disruption = Disruption.START
    memory_delta: int = 0

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"servers.{self.spec.name}"


@dataclass(frozen=True, slots=True)
class MoveListener:
    """Open the new address, then drain the old one."""

    old: ListenerSpec
    new: ListenerSpec
    reason: str
    disruption: Disruption = Disruption.NONE
    memory_delta: int = 0

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"servers.{self.new.name}"


@dataclass(frozen=True, slots=True)
class UpdateListener:
    """Change a listener that keeps its socket: which models, which keys, CORS."""

    old: ListenerSpec
    new: ListenerSpec
    reason: str
    disruption: Disruption = Disruption.NONE
    memory_delta: int = 0

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"servers.{self.new.name}"


@dataclass(frozen=True, slots=True)
class CloseListener:
    """Drain a port and close it."""

    spec: ListenerSpec
    reason: str
    disruption: Disruption = Disruption.STOP
    memory_delta: int = 0

    @property
    def target(self) -> str:
        """Dotted path of what is touched."""
        return f"servers.{self.spec.name}"


ModelAction = StartModel | ReplaceModel | UpdateModel | StopModel
ListenerAction = OpenListener | MoveListener | UpdateListener | CloseListener
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
