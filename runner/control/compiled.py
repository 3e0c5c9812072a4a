"""What passes between the runner and the process that reads manifests (`runner.control.compiler`), pickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.options import Options
from runner.plan.spec import Desired

if TYPE_CHECKING:
    from runner.plan.digests import DigestCache

Request = tuple[Path, str | None, "DigestCache | None"]
"""The manifest, the only name that it may have (None: any), and what was read before: the process keeps nothing
between two lives."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a manifest: `desired`, or what is wrong with it.

    `name` and `files` (the manifest, its secrets, its local models and adapters, there or not) are known once the
    manifest itself is sound, else "" and (). `missing` is a hub repository and revision to download first.
    """

    path: Path
    name: str = ""
    files: tuple[Path, ...] = ()
    desired: Desired | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    missing: tuple[str, str] | None = None
    options: Options | None = None
    digests: DigestCache | None = None

    def error(self) -> ManifestError | None:
        """What is wrong, None when nothing is."""
        if not self.diagnostics:
            return None
        if self.missing is not None:
            return NotDownloaded(list(self.diagnostics), *self.missing)
        return ManifestError(list(self.diagnostics))
