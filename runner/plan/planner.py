"""desired × observed → plan. Pure: same arguments, same plan; nothing is read, started or timed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runner.plan.actions import (
    DEFAULT_BOUNDS,
    NOTHING,
    Action,
    Against,
    Bounds,
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
from runner.plan.changes import changes
from runner.plan.forecast import ENGINE_BYTES, Forecast, footprint, make_room, most, total
from runner.plan.spec import AdapterSpec, Desired, DraftSpec, ListenerSpec, ModelSpec

_REMOVED = "removed from the manifest"


@dataclass(frozen=True, slots=True)
class Observed:
    """What runs now, as the specs it was brought up with. `memory_bytes` is what the machine has, `drift` what of it
    was changed without the manifest, in a few words each. `removed` is the reason to stop what is not desired."""

    models: tuple[ModelSpec, ...] = ()
    listeners: tuple[ListenerSpec, ...] = ()
    memory_bytes: int = 0
    bounds: Bounds = DEFAULT_BOUNDS
    against: Against = NOTHING
    drift: tuple[str, ...] = ()
    removed: str = _REMOVED


def plan(desired: Desired, observed: Observed) -> Plan:
    """The actions that turn `observed` into `desired`, in the manifest's order; what goes comes last, by name.

    Listeners open before models load (a request that comes early waits instead of being refused), and close after.
    Models that go end first where others need their memory.
    """
    listening = {s.name: s for s in observed.listeners}
    wanted = {s.name: s for s in desired.listeners}
    actions: list[Action] = []
    heirs = {new.port: name for name, new in wanted.items() if _opens(listening.get(name), new)}
    for listener in wanted.values():
        actions += _listener_actions(listening.get(listener.name), listener, heirs)
    models = _Models(desired, observed)
    actions += models.actions()
    actions += [
        _close(listening[name], heirs.get(listening[name].port, "")) for name in sorted(listening.keys() - wanted)
    ]
    touched = {a.target for a in actions}
    kept = [f"models.{m.name}" for m in desired.models] + [f"servers.{name}" for name in wanted]
    return Plan(
        name=desired.name,
        actions=tuple(actions),
        unchanged=tuple(target for target in kept if target not in touched),
        memory=models.forecast(),
        downloads=desired.downloads,
        bounds=observed.bounds,
        against=observed.against,
        drift=observed.drift,
    )


class _Models:
    """Which engine serves which deployment afterwards, and so what has to happen to each."""

    def __init__(self, desired: Desired, observed: Observed) -> None:
        self._desired = desired.models
        self._before = {m.name: m for m in observed.models}
        self._limit = desired.memory_limit_bytes or observed.memory_bytes
        self._taken = _taken_over(self._desired, self._before)
        kept = {old.name for old in self._taken.values()}
        self._replaced = {
            m.name: self._before[m.name]
            for m in self._desired
            if m.name not in self._taken and m.name in self._before and m.name not in kept
        }
        self._gone = [
            self._before[name] for name in sorted(self._before) if name not in kept and name not in self._replaced
        ]
        self._removed = observed.removed
        self._drift = observed.drift
        self._held = total(self._before.values())
        self._incoming = total(m for m in self._desired if m.name not in self._taken)
        short = self._held + self._incoming - self._limit
        self._first = make_room(short, self._gone, list(self._replaced.values()))

    def forecast(self) -> Forecast:
        """What it does to memory."""
        released = sum(footprint(self._before[name]) for name in self._first)
        return Forecast(
            before=self._held,
            after=total(self._desired),
            peak=max(self._held, self._held + self._incoming - released),
            most=sum(most(m) + ENGINE_BYTES for m in self._desired if m.load != "on_demand"),
            limit=self._limit,
        )

    def actions(self) -> list[Action]:
        """What ends first, then the manifest's models in order, then what else ends."""
        stops = [
            StopModel(spec=old, first=old.name in self._first, reason=self._why_gone(old.name)) for old in self._gone
        ]
        actions: list[Action] = [stop for stop in stops if stop.first]
        for new in self._desired:
            action = self._action(new)
            if action is not None:
                actions.append(action)
        return actions + [stop for stop in stops if not stop.first]

    def _action(self, new: ModelSpec) -> Action | None:
        if (old := self._taken.get(new.name)) is not None:
            return _update(old, new)
        if (old := self._replaced.get(new.name)) is not None:
            waits = old.name in self._first or new.load == "on_demand"
            disruption = Disruption.DRAIN if waits else Disruption.SURGE
            return ReplaceModel(old=old, spec=new, reason=_replace_reason(old, new), disruption=disruption)
        if new.name in self._before:
            heir = next(name for name, taken in self._taken.items() if taken.name == new.name)
            return StartModel(spec=new, reason=f"its engine goes on as models.{heir}")
        if new.load == "on_demand":
            return StartModel(spec=new, reason="loads at its first request", disruption=Disruption.NONE)
        return StartModel(spec=new, reason="not running")

    def _why_gone(self, name: str) -> str:
        successor = self._taken.get(name)
        if successor is None and f"models.{name} loaded" in self._drift:
            return "loaded by the admin API, and in no manifest"
        return (
            self._removed if successor is None else f"models.{name} goes on with the engine of models.{successor.name}"
        )


def _taken_over(desired: tuple[ModelSpec, ...], before: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """The running engine, by its spec, that each deployment goes on with. Its own where that serves, else one of the
    same digest that nobody wants under its old name: one with the same adapters before others, then by name."""
    wanted = {m.name: m for m in desired}
    taken = {
        name: before[name]
        for name, new in wanted.items()
        if name in before and before[name].process_digest == new.process_digest
    }
    free: dict[str, list[ModelSpec]] = {}
    for name in sorted(before):
        if name not in taken:
            free.setdefault(before[name].process_digest, []).append(before[name])
    for new in desired:
        candidates = free.get(new.process_digest)
        if new.name not in taken and candidates:
            keys = {a.key for a in new.adapters}
            best = min(candidates, key=lambda old: {a.key for a in old.adapters} != keys)
            candidates.remove(best)
            taken[new.name] = best
    return taken


def _opens(old: ListenerSpec | None, new: ListenerSpec) -> bool:
    """Whether an address has to be opened that this server does not have."""
    return old is None or old.address != new.address


def _close(old: ListenerSpec, heir: str) -> CloseListener:
    return CloseListener(spec=old, heir=heir, reason=_REMOVED + _inherits(heir))


def _inherits(heir: str) -> str:
    return f"; servers.{heir} gets its port" if heir else ""


def _listener_actions(old: ListenerSpec | None, new: ListenerSpec, heirs: Mapping[int, str]) -> list[Action]:
    """`heirs` are the servers that open a port, by port."""
    if old is None:
        return [OpenListener(spec=new, reason="new in the manifest")]
    if old == new:
        return []
    if old.address != new.address:
        heir = heirs.get(old.port, "")
        # One port cannot be had twice, so the old address has to be given back first.
        disruption = Disruption.DRAIN if heir else Disruption.NONE
        heir = heir if heir != new.name else ""
        reason = f"address {old.host}:{old.port} → {new.host}:{new.port}{_inherits(heir)}"
        return [MoveListener(old=old, spec=new, heir=heir, reason=reason, disruption=disruption)]
    reason = "changed: " + ", ".join(c.path for c in changes(old, new))
    if old.tls != new.tls:
        return [MoveListener(old=old, spec=new, reason=reason, disruption=Disruption.NONE)]
    return [UpdateListener(old=old, spec=new, reason=reason)]


def _update(old: ModelSpec, new: ModelSpec) -> Action | None:
    if old == new:
        return None
    load, drop = _adapters_that(old, new)
    if old.name != new.name:
        reasons = [f"renamed from models.{old.name}", *_update_reasons(old, new)]
        return RenameModel(old=old, spec=new, load=load, drop=drop, reason="; ".join(reasons))
    reason = "; ".join(_update_reasons(old, new)) or "its files lie elsewhere"
    return UpdateModel(old=old, spec=new, load=load, drop=drop, reason=reason)


def _adapters_that(old: ModelSpec, new: ModelSpec) -> tuple[tuple[AdapterSpec, ...], tuple[AdapterSpec, ...]]:
    """Those that come, and those that go."""
    had, has = {a.key: a for a in old.adapters}, {a.key: a for a in new.adapters}
    load = tuple(a for key, a in has.items() if key not in had)
    return load, tuple(a for key, a in had.items() if key not in has)


def _replace_reason(old: ModelSpec, new: ModelSpec) -> str:
    if old.source != new.source:
        return f"source {old.source} → {new.source}"
    if old.weights_digest != new.weights_digest:
        return "the model's files changed"
    if old.trust_remote_code != new.trust_remote_code:
        return f"its own code may {'' if new.trust_remote_code else 'not '}run: trust_remote_code"
    if old.draft != new.draft:
        return _draft_reason(old.draft, new.draft)
    if old.quantization != new.quantization:
        return f"quantization {_quantization(old)} → {_quantization(new)}"
    if old.dtype != new.dtype:
        return f"dtype {old.dtype or 'of the source'} → {new.dtype or 'of the source'}"
    if old.kv_cache != new.kv_cache:
        return f"KV cache {_kv_cache(old)} → {_kv_cache(new)}"
    if old.chat_template != new.chat_template:
        return "the chat template changed"
    if old.tool_parser != new.tool_parser:
        return f"tool_parser {old.tool_parser or 'by the template'} → {new.tool_parser or 'by the template'}"
    return "memory_limit changed"


def _kv_cache(spec: ModelSpec) -> str:
    if (how := spec.kv_cache) is None:
        return "as computed"
    start = f" from {how.quantized_start} tokens on" if how.quantized_start else ""
    return f"{how.bits} bits (groups of {how.group_size}){start}"


def _quantization(spec: ModelSpec) -> str:
    wanted = spec.quantization
    if wanted is None:
        return "as the source is"
    rules = f", {len(wanted.layers)} rules" if wanted.layers else ""
    return f"{wanted.mode} {wanted.bits} bits (groups of {wanted.group_size}{rules})"


def _draft_reason(old: DraftSpec | None, new: DraftSpec | None) -> str:
    if old is None or new is None:
        return "draft removed" if new is None else f"draft {new.source} added"
    if old.source != new.source:
        return f"draft {old.source} → {new.source}"
    return "the draft's files changed" if old.digest != new.digest else "draft: trust_remote_code changed"


def _update_reasons(old: ModelSpec, new: ModelSpec) -> list[str]:
    parts: list[str] = []
    had, has = {a.name: a for a in old.adapters}, {a.name: a for a in new.adapters}
    parts += [f"adapter {name} added" for name in has if name not in had]
    parts += [f"adapter {name} removed" for name in had if name not in has]
    parts += [f"adapter {name} changed" for name in has if name in had and has[name].key != had[name].key]
    rest = [
        c.path for c in changes(old, new) if not c.path.startswith("adapters.") and c.path not in ("path", "source")
    ]
    if rest:
        parts.append("changed: " + ", ".join(rest))
    return parts
