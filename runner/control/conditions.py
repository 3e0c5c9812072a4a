"""How each model stands, as Kubernetes' conditions say it: a status, a reason for machines, a message for people, and
since when.

Two writers, each with conditions of its own: the reconciler says whether a model can be had (`Resolved`, `Downloaded`,
`Fits`), its deployment whether it is there (`Loaded`, `Ready`, `Degraded`). What changes is the status; a reason or a
message that changes alone leaves `since` as it is and is no event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from runner.errors import Diagnostic
from runner.manifest.names import model_of

Status = Literal["true", "false", "unknown"]

ABOUT_THE_MANIFEST: Final = ("Resolved", "Downloaded", "Fits")
ABOUT_THE_ENGINE: Final = ("Loaded", "Ready", "Degraded")
TYPES: Final = (*ABOUT_THE_MANIFEST, *ABOUT_THE_ENGINE)
GOOD: Final[dict[str, Status]] = {**dict.fromkeys(TYPES, "true"), "Degraded": "false"}
"""The status that one wishes for."""

_NOT_DOWNLOADED: Final = "E604"
_TOO_LARGE: Final = "E7"
_REASONS: Final = {"E601": "NotFound", "E602": "Incomplete", "E603": "NotReadable", "E605": "OwnedByAnother"}


class Condition(NamedTuple):
    """`reason` is CamelCase, `since` when the status became what it is, in seconds since the epoch."""

    status: Status
    reason: str
    message: str
    since: float

    @property
    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return self._asdict()


class Conditions:
    """Conditions of one model. `target` names it as in the manifest; `emit` is told of transitions."""

    def __init__(self, target: Callable[[], str], emit: Callable[..., None], first: Mapping[str, tuple[Status, str]]):
        now = round(time.time(), 3)
        self._target = target
        self._emit = emit
        self._held = {kind: Condition(status, reason, "", now) for kind, (status, reason) in first.items()}

    def __getitem__(self, kind: str) -> Condition:
        return self._held[kind]

    def set(self, kind: str, status: Status, reason: str, message: str = "") -> None:
        """What is so now."""
        before = self._held[kind]
        changed = before.status != status
        since = round(time.time(), 3) if changed else before.since
        self._held[kind] = Condition(status, reason, message, since)
        if changed and (before.status != "unknown" or status != "true"):  # a first look that finds all well is no news
            self._emit(
                "condition", target=self._target(), condition=kind, status=status, reason=reason, message=message
            )

    @property
    def as_json(self) -> dict[str, dict[str, Any]]:
        """By type, as plain data."""
        return {kind: condition.as_json for kind, condition in self._held.items()}


class Wanted:
    """`Resolved`, `Downloaded` and `Fits` of each model that the manifest wants, whether it is served (yet) or not."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._models: dict[str, Conditions] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The models that there is something to say of."""
        return tuple(self._models)

    def of(self, name: str) -> Conditions:
        """The conditions of a model; all unknown until something is known."""
        if name not in self._models:
            unknown: tuple[Status, str] = ("unknown", "NotLookedAt")
            first = dict.fromkeys(ABOUT_THE_MANIFEST, unknown)
            self._models[name] = Conditions(lambda: f"models.{name}", self._emit, first)
        return self._models[name]

    def keep(self, names: Iterable[str]) -> None:
        """Forget all models but these."""
        kept = set(names)
        self._models = {name: held for name, held in self._models.items() if name in kept}

    def can_be_had(self, names: Iterable[str]) -> None:
        """The manifest was resolved."""
        for name in names:
            conditions = self.of(name)
            conditions.set("Resolved", "true", "SourcesFound")
            conditions.set("Downloaded", "true", "OnThisMachine")
            conditions.set("Fits", "true", "WithinMemory")

    def not_downloaded(self, names: Iterable[str], reason: str, message: str) -> None:
        """What these models need is on its way, or did not come."""
        for name in names:
            self.of(name).set("Downloaded", "false", reason, message)

    def wrong(self, names: Iterable[str], diagnostics: Iterable[Diagnostic]) -> None:
        """The manifest wants these models, and this is what is wrong with it."""
        wanted = tuple(names)
        for name in wanted:
            self.of(name)
        for diagnostic in diagnostics:
            for name in wanted:
                if concerns(diagnostic, name, wanted):
                    self._judge(self.of(name), diagnostic)

    def _judge(self, conditions: Conditions, diagnostic: Diagnostic) -> None:
        code, message = diagnostic.code, diagnostic.message
        if code == _NOT_DOWNLOADED:
            conditions.set("Downloaded", "false", "NotDownloaded", message)
        elif code.startswith(_TOO_LARGE):
            conditions.set("Fits", "false", "TooLarge", message)
        else:
            conditions.set("Resolved", "false", _REASONS.get(code, "Invalid"), message)


def concerns(diagnostic: Diagnostic, name: str, names: Iterable[str]) -> bool:
    """Whether it is of this model, of all these; what is too large together is of all of them."""
    of_all = diagnostic.code.startswith(_TOO_LARGE) and not diagnostic.path.startswith("models.")
    return of_all or model_of(diagnostic.path, names) == name
