"""The manifest that a runner follows: its files, how they were last seen, and what of them is live on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.control.drift import Drift
from runner.control.ledger import Cause, Intent, Ledger
from runner.control.portion import Portion
from runner.errors import Diagnostic
from runner.manifest.inputs import Inputs
from runner.plan.actions import Plan
from runner.plan.spec import Desired, Download


@dataclass(slots=True)
class Followed:
    """`inputs` and `hub_token` are what the last pass read, `missing` what it had to download, and `seen` stands for
    what they came to (`Ledger.seen`).

    `watching`: edits go live as they are saved; `frozen`: what the lock does not have is refused. `portion` and `drift`
    are what is kept from the manifest, or changed beside it, until its next apply or edit.
    """

    paths: tuple[Path, ...]
    inputs: Inputs
    hub_token: str = field(default="", repr=False)
    missing: tuple[Download, ...] = ()
    seen: str = ""
    watching: bool = True
    frozen: bool = False
    portion: Portion = field(default_factory=Portion)
    drift: Drift = field(default_factory=Drift)
    warnings: tuple[Diagnostic, ...] = ()

    def intent(self, desired: Desired, plan: Plan, cause: Cause, restores: int = 0) -> Intent:
        """What is to be made so, with the manifest as it is seen."""
        return Intent(desired, plan, cause, tuple(map(str, self.paths)), self.seen, restores)

    def obstacle(self, ledger: Ledger) -> str:
        """How what is live differs from the manifest on purpose, but for the admin API; empty where it does not."""
        return ledger.drift(self.seen) or self.portion.drift()

    def status(self, ledger: Ledger) -> dict[str, Any]:
        """Its part of `mlx-run status`."""
        return {
            "manifest": str(self.paths[0]),
            "manifests": [str(path) for path in self.paths],
            "watching": self.watching,
            "frozen": self.frozen,
            "drift": self.obstacle(ledger) or self.drift.text(),
            "left_out": list(self.portion.left_out),
            "changes": self.drift.as_json(),
            "warnings": told(self.warnings),
        }


def told(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    """Diagnostics as plain data."""
    kept = ("file", "line", "column", "path", "message", "hint", "code")
    return [{key: getattr(found, key) for key in kept} for found in diagnostics]
