"""What the admin API has changed since the manifest was applied: it holds until the manifest's next edit or apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner.control.compiled import Compiled
from runner.errors import CannotBeDone, Conflict
from runner.manifest.drift import NO_CHANGES, Changes, Declared, lines, to_json
from runner.plan.spec import Desired

Edit = Callable[[Changes, Declared], Changes]
"""What there is, and what the manifest declares, to what there shall be. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Drift:
    """`changes` are live, over the manifest as it was `seen` (`runner.control.ledger.Ledger.seen`)."""

    changes: Changes = NO_CHANGES
    seen: str = ""

    def holds(self, seen: str) -> bool:
        """Whether a manifest that is seen like this leaves the changes as they are."""
        return bool(self.changes) and self.seen == seen

    @property
    def lines(self) -> tuple[str, ...]:
        """A few words for each change."""
        return tuple(lines(self.changes))

    def text(self) -> str:
        """How what is live differs from the manifest on purpose; empty where it does not."""
        return f"{', '.join(self.lines)} by the admin API" if self.changes else ""

    def as_json(self) -> dict[str, Any] | None:
        """As plain data, for `mlx-run adopt`; None where there is none."""
        return to_json(self.changes) if self.changes else None


def declared(compiled: Compiled) -> Declared:
    """What the manifest says, alone."""
    models = compiled.desired.models if compiled.desired is not None else ()
    return {model.name: [adapter.name for adapter in model.adapters] for model in models}


def require_as_seen(seen: str, before: str, obstacle: str) -> None:
    """Raises Conflict where the manifest is not what is live: the API changes what was applied, and nothing else."""
    if obstacle:
        raise Conflict(f"{obstacle}; POST /v1/apply, or `mlx-run apply`, first", code="not_in_sync")
    if seen != before:
        raise Conflict(
            "the manifest was edited, and that is not live (yet): it goes first, with POST /v1/apply where edits are "
            "not followed",
            code="not_in_sync",
        )


def require_served(desired: Desired, changes: Changes) -> None:
    """Raises CannotBeDone where no server would serve a model that was added."""
    serving = {name for listener in desired.listeners if set(listener.apis) - {"admin"} for name in listener.models}
    for name in changes.models:
        if name not in serving:
            raise CannotBeDone(
                f"no server would serve `{name}`: each lists its models; name some in `servers`", code="not_served"
            )
