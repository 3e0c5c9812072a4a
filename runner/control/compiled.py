"""What passes between the runner and the process that reads manifests (`runner.control.compiler`), pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.manifest.inputs import Inputs
from runner.options import Options
from runner.plan.spec import Desired

Request = tuple[tuple[Path, ...], str | None, bytes | None, bool]
"""The manifest's files, merged left to right, the only name that it may have (None: any), what was read before (the
process keeps nothing between two lives), and whether its lock has to be there and to hold."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a manifest: `desired`, or what is wrong with it.

    `paths` are the manifest and its overlays, absolute. `inputs` are what it depends on and the state that was read, as
    far as reading came. `name` and the names of the `models` are known once the manifest itself is sound. `warnings`
    keep nothing from running. `missing` is a hub repository and revision to download first; with it, `provisional` is
    the desired state with stand-ins for what is not there yet. `digests` is what was read of models' folders, sealed:
    the runner has no use for it but to hand it to the next process. `hub_token` is what private repositories are read
    with, empty for what the hub's library finds by itself.
    """

    paths: tuple[Path, ...]
    inputs: Inputs = field(default_factory=Inputs)
    name: str = ""
    models: tuple[str, ...] = ()
    desired: Desired | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()
    missing: tuple[str, str] | None = None
    provisional: Desired | None = None
    options: Options | None = None
    digests: bytes | None = None
    hub_token: str = field(default="", repr=False)

    def error(self) -> ManifestError | None:
        """What is wrong, None when nothing is."""
        if not self.diagnostics:
            return None
        if self.missing is not None:
            return NotDownloaded(list(self.diagnostics), *self.missing)
        return ManifestError(list(self.diagnostics))
