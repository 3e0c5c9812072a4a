"""desired × observed → plan. Pure: same arguments, same plan; nothing is read, started or timed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

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
from runner.plan.spec import Desired, ListenerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Observed:
    """What runs now, as the specs it was brought up with. `memory_bytes` is what the machine has."""

    models: tuple[ModelSpec, ...] = ()
    listeners: tuple[ListenerSpec, ...] = ()
    memory_bytes: int = 0


def plan(desired: Desired, observed: Observed) -> Plan:
    """The actions that turn `observed` into `desired`.

    Listeners open before models load (a request that comes early waits instead of being refused), and close after.
    """
    before = {m.name: m for m in observed.models}
    after = {m.name: m for m in desired.models}
    listening = {s.name: s for s in observed.listeners}
    wanted = {s.name: s for s in desired.listeners}
    room = _room(desired, observed)

    actions: list[Action] = []
    for listener in wanted.values():
        actions += _listener_actions(listening.get(listener.name), listener)
    for model in after.values():
        actions += _model_actions(before.get(model.name), model, room)
    actions += [
        StopModel(spec=m, reason="removed from the manifest") for name, m in before.items() if name not in after
    ]
    actions += [
        CloseListener(spec=s, reason="removed from the manifest") for name, s in listening.items() if name not in wanted
    ]
    touched = {a.target for a in actions}
    kept = [f"models.{name}" for name in after] + [f"servers.{name}" for name in wanted]
    return Plan(
        name=desired.name,
        actions=tuple(actions),
        unchanged=tuple(target for target in kept if target not in touched),
        weights_before=_weights(before.values()),
        weights_after=_weights(after.values()),
    )


def _weights(models: Iterable[ModelSpec]) -> int:
    return sum(m.weights_bytes for m in models)


def _room(desired: Desired, observed: Observed) -> int:
    """Bytes of weights that may be held on top of what runs, while an old and a new engine overlap."""
    limit = desired.memory_limit_bytes or observed.memory_bytes
    return limit - _weights(observed.models)


def _listener_actions(old: ListenerSpec | None, new: ListenerSpec) -> list[Action]:
    if old is None:
        return [OpenListener(spec=new, reason="new in the manifest")]
    if old == new:
        return []
    if old.address != new.address:
        # One port cannot be had twice, so the old address has to be given back first.
        disruption = Disruption.DRAIN if old.port == new.port else Disruption.NONE
        reason = f"address {old.host}:{old.port} → {new.host}:{new.port}"
        return [MoveListener(old=old, spec=new, reason=reason, disruption=disruption)]
    return [UpdateListener(old=old, spec=new, reason="changed: " + ", ".join(_changed(old, new)))]


def _model_actions(old: ModelSpec | None, new: ModelSpec, room: int) -> list[Action]:
    if old is None:
        return [StartModel(spec=new, reason="not running")]
    if old.process_digest != new.process_digest:
        disruption = Disruption.SURGE if new.weights_bytes <= room else Disruption.DRAIN
        return [ReplaceModel(old=old, spec=new, reason=_replace_reason(old, new), disruption=disruption)]
    if old == new:
        return []
    had, has = {a.key: a for a in old.adapters}, {a.key: a for a in new.adapters}
    return [
        UpdateModel(
            old=old,
            spec=new,
            load=tuple(a for key, a in has.items() if key not in had),
            drop=tuple(a for key, a in had.items() if key not in has),
            reason=_update_reason(old, new),
        )
    ]


def _replace_reason(old: ModelSpec, new: ModelSpec) -> str:
    if old.source != new.source:
        return f"source {old.source} → {new.source}"
    if old.weights_digest != new.weights_digest:
        return "the model's files changed"
    return "memory_limit changed"


def _update_reason(old: ModelSpec, new: ModelSpec) -> str:
    parts: list[str] = []
    had, has = {a.name: a for a in old.adapters}, {a.name: a for a in new.adapters}
    parts += [f"adapter {name} added" for name in has if name not in had]
    parts += [f"adapter {name} removed" for name in had if name not in has]
    parts += [f"adapter {name} changed" for name in has if name in had and has[name].key != had[name].key]
    rest = [f for f in _changed(old, new) if f not in ("adapters", "path", "source", "weights_bytes")]
    if rest:
        parts.append("changed: " + ", ".join(rest))
    return "; ".join(parts) or "adapter paths changed"


def _changed(old: ListenerSpec | ModelSpec, new: ListenerSpec | ModelSpec) -> list[str]:
    """Names of the fields that differ; names only, so that a secret's value never gets into a reason."""
    return [f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name)]
