"""The actions a plan is made of. Each says what it touches, why, and who notices; none of them does anything.

`runner.control.executor` carries them out, `runner.plan.render` prints them: both see the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from runner.options import DRAIN_TIMEOUT, LOAD_WAIT
from runner.plan.changes import Change, changes
from runner.plan.forecast import Forecast, footprint
from runner.plan.spec import AdapterSpec, Download, ListenerSpec, ModelSpec


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
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(None, self.spec)

    @property
    def memory_delta(self) -> int:
        """Bytes that engines hold after, less those before."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModel(ModelAction):
    """Bring up an engine for a deployment that has none."""

    disruption: Disruption = Disruption.START

    @property
    def memory_delta(self) -> int:
        """All of it is new."""
        return footprint(self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceModel(ModelAction):
    """Bring up an engine of the new spec and retire the old one.

    SURGE starts the new one beside the old, so both are held meanwhile; DRAIN stops the old one first, and requests
    wait.
    """

    old: ModelSpec

    @property
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(self.old, self.spec)

    @property
    def memory_delta(self) -> int:
        """Once the old engine is gone."""
        return footprint(self.spec) - footprint(self.old)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateModel(ModelAction):
    """Change a running deployment in place. `load` and `drop` are adapters that come and go in the engine."""

    old: ModelSpec
    load: tuple[AdapterSpec, ...]
    drop: tuple[AdapterSpec, ...]
    disruption: Disruption = Disruption.NONE

    @property
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(self.old, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenameModel(UpdateModel):
    """Serve a running engine under another name, and change what else is different in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopModel(ModelAction):
    """Drain a deployment's engine and stop it; requests for it get 404.

    `first`: others need its memory, so it ends before they start, and is brought up again should the plan fail.
    """

    first: bool = False
    disruption: Disruption = Disruption.STOP

    @property
    def changes(self) -> tuple[Change, ...]:
        """All of it goes."""
        return changes(self.spec, None)

    @property
    def memory_delta(self) -> int:
        """All of it is given back."""
        return -footprint(self.spec)


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
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(None, self.spec)

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
    """Open the new address, then drain the old one; where the old port is wanted again (DRAIN), by this server at
    another address or by the one that is `heir`, it is given back first.

    With another certificate on the same address, a new listener takes the socket over, and the old one drains."""

    old: ListenerSpec
    heir: str = ""

    @property
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(self.old, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateListener(ListenerAction):
    """Change a listener that keeps its socket: which models, which keys, CORS."""

    old: ListenerSpec
    disruption: Disruption = Disruption.NONE

    @property
    def changes(self) -> tuple[Change, ...]:
        """What differs, field by field."""
        return changes(self.old, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseListener(ListenerAction):
    """Drain a port and close it; first of all where the server that is `heir` is to have the port."""

    heir: str = ""
    disruption: Disruption = Disruption.STOP

    @property
    def changes(self) -> tuple[Change, ...]:
        """All of it goes."""
        return changes(self.spec, None)


Action = ModelAction | ListenerAction


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds. Who has to go first gets `drain` to finish its requests; a request that finds its model away is held for
    at most `hold`, then it gets 503 with Retry-After."""

    drain: float
    hold: float


@dataclass(frozen=True, slots=True)
class Against:
    """What was compared with: what runs, the last committed generation where no runner is up, or nothing."""

    what: Literal["runner", "generation", "nothing"]
    generation: int


DEFAULT_BOUNDS: Final = Bounds(DRAIN_TIMEOUT, LOAD_WAIT)
NOTHING: Final = Against("nothing", 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to happen, in the order it is printed. Empty when observed equals desired.

    With `downloads` it is provisional: what is not there yet is known by its name alone, and has no size. `drift` is
    what runs and no manifest says, in a few words each.
    """

    name: str
    actions: tuple[Action, ...]
    unchanged: tuple[str, ...]
    memory: Forecast
    downloads: tuple[Download, ...] = ()
    bounds: Bounds = DEFAULT_BOUNDS
    against: Against = NOTHING
    drift: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing has to be done."""
        return not self.actions
