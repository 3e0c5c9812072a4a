"""A part of a manifest: what `apply --target` and `apply --prune=false` are about. Pure, like the planner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from runner.errors import RunnerError
from runner.manifest.names import model_of
from runner.plan.forecast import total
from runner.plan.planner import Observed
from runner.plan.spec import Desired, ListenerSpec, ModelSpec

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound


@dataclass(frozen=True, slots=True)
class Scope:
    """`targets` are models (`chat`, `models.chat`) and servers (`servers.lm`); none means all of the manifest.

    Without `prune` what runs and is not in the manifest stays.
    """

    targets: tuple[str, ...] = ()
    prune: bool = True

    @property
    def whole(self) -> bool:
        """Whether it leaves nothing out."""
        return not self.targets and self.prune

    def __str__(self) -> str:
        """As on the command line."""
        parts = [f"--target {target}" for target in self.targets]
        return " ".join(parts if self.prune else [*parts, "--prune=false"])


WHOLE: Final = Scope()


def within(scope: Scope, desired: Desired, observed: Observed) -> Desired:
    """What is desired once `scope` has left its part out: there everything stays as it is observed.

    A targeted model brings along that the servers which are to have it serve it, and opens those that are not up yet.
    A target that is not there (any more) is passed over: `require_targets` is for those that a person gives. Raises
    RunnerError where what stays and what comes cannot be had together.
    """
    if scope.whole:
        return desired
    part = _Part(scope, desired, observed)
    models = tuple(part.models())
    listeners = tuple(part.listeners({model.name for model in models}))
    _require_ids(models, desired, scope)
    _require_ports(listeners, scope)
    _require_memory(models, desired.memory_limit_bytes or observed.memory_bytes, scope)
    coming = {model.name for model in models if desired.model(model.name) is model}
    known = [model.name for model in desired.models]
    downloads = tuple(d for d in desired.downloads if coming & {model_of(target, known) for target in d.targets})
    return replace(desired, models=models, listeners=listeners, downloads=downloads)


class _Part:
    def __init__(self, scope: Scope, desired: Desired, observed: Observed) -> None:
        self._wanted = {m.name: m for m in desired.models}
        self._running = {m.name: m for m in observed.models}
        self._servers = {s.name: s for s in desired.listeners}
        self._listening = {s.name: s for s in observed.listeners}
        self._prune = scope.prune
        known = _known(desired, observed)
        self._targets = {_path(target, known) for target in scope.targets} if scope.targets else known

    def models(self) -> Iterator[ModelSpec]:
        """In the manifest's order; what is not in it comes last."""
        for name in dict.fromkeys((*self._wanted, *self._running)):
            model = (self._wanted if self._is_target(name) else self._running).get(name)
            if model is None and self._is_target(name) and not self._prune:
                model = self._without_lost_aliases(self._running[name])
            if model is not None:
                yield model

    def _without_lost_aliases(self, stays: ModelSpec) -> ModelSpec:
        """An alias that the manifest gives to another model is that one's."""
        given = {alias for model in self._wanted.values() for alias in model.aliases}
        return replace(stays, aliases=tuple(alias for alias in stays.aliases if alias not in given))

    def listeners(self, live: set[str]) -> Iterator[ListenerSpec]:
        """In the manifest's order; what is not in it comes last. `live` are the models that there will be."""
        for name in dict.fromkeys((*self._servers, *self._listening)):
            listener = self._listener(name)
            if listener is not None:
                yield replace(listener, models=tuple(m for m in dict.fromkeys(self._serves(name)) if m in live))

    def _listener(self, name: str) -> ListenerSpec | None:
        had, has = self._listening.get(name), self._servers.get(name)
        if f"servers.{name}" in self._targets:
            return has or (None if self._prune else had)
        if had is None and has is not None and any(map(self._is_target, has.models)):
            return has
        return had

    def _serves(self, name: str) -> Iterator[str]:
        """The manifest says what a targeted server serves, and which servers serve a targeted model; what the manifest
        does not name any more is served on."""
        had, has = self._listening.get(name), self._servers.get(name)
        before, after = had.models if had else (), has.models if has else ()
        if has is not None and (had is None or f"servers.{name}" in self._targets):
            yield from after
            yield from (m for m in before if m not in self._wanted)
        else:
            yield from (m for m in before if m in after or m not in self._wanted or not self._is_target(m))
            yield from filter(self._is_target, after)

    def _is_target(self, model: str) -> bool:
        return f"models.{model}" in self._targets


def require_targets(scope: Scope, desired: Desired, observed: Observed) -> None:
    """Raises RunnerError where a target is nowhere."""
    known = _known(desired, observed)
    for target in scope.targets:
        if _path(target, known) is None:
            models = ", ".join(sorted(path.removeprefix("models.") for path in known if path.startswith("models.")))
            raise RunnerError(
                f"--target {target}: neither the manifest nor what runs has a model of that name",
                hint=f"Models: {models or 'none'}. A server is a target too, as servers.NAME.",
            )


def _known(desired: Desired, observed: Observed) -> set[str]:
    models = {f"models.{model.name}" for model in (*desired.models, *observed.models)}
    return models | {f"servers.{listener.name}" for listener in (*desired.listeners, *observed.listeners)}


def _path(target: str, known: set[str]) -> str | None:
    return next((path for path in (f"models.{target}", target) if path in known), None)


def _require_ids(models: Iterable[ModelSpec], desired: Desired, scope: Scope) -> None:
    owners: dict[str, str] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            other = owners.setdefault(name, model.name)
            if other != model.name:
                raise RunnerError(
                    f"{scope}: {name!r} would mean both models.{other} and models.{model.name}",
                    hint=f"Apply both (--target {other} --target {model.name}), or all of the manifest.",
                )


def _require_ports(listeners: tuple[ListenerSpec, ...], scope: Scope) -> None:
    for number, one in enumerate(listeners):
        for other in listeners[:number]:
            same = one.host == other.host or {one.host, other.host} & set(_EVERYWHERE)
            if one.port == other.port and same:
                raise RunnerError(
                    f"{scope}: servers.{other.name} and servers.{one.name} would both have port {one.port}",
                    hint=f"Apply servers.{other.name} and servers.{one.name} together, or all of the manifest.",
                )


def _require_memory(models: tuple[ModelSpec, ...], limit: int, scope: Scope) -> None:
    needed = total(models)
    if limit and needed > limit:
        raise RunnerError(
            f"{scope}: what stays and what comes need {needed:,} bytes together, and {limit:,} may be used",
            hint="Apply all of the manifest, or remove what is not needed any more.",
        )
