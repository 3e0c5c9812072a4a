"""Who uses what: the sources of every manifest that a runner of this user follows or followed last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from runner.control import client
from runner.control.ledger import load_committed
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError, MlxRunError
from runner.hub.cache import snapshot_folder
from runner.manifest.load import load_manifest
from runner.plan.available import Use
from runner.plan.sources import sources


class Uses(NamedTuple):
    """`notes` say what could not be read, so that its uses may not all be known."""

    uses: tuple[Use, ...]
    notes: tuple[str, ...]


def known_uses(
    state: Path, hub: Path, manifests: Iterable[tuple[Path, ...]] = (), env: Mapping[str, str] = os.environ
) -> Uses:
    """What the runners of a state folder serve, what the manifests that they follow ask for now, as they are locked or
    by branch, and what further `manifests` do."""
    uses: list[Use] = []
    notes: list[str] = []
    wanted = dict.fromkeys(manifests)
    for name in sorted(path.name for path in state.iterdir() if path.is_dir()) if state.is_dir() else ():
        folder = StateFolder(state, name, create=False)
        served, files = _served(folder)
        uses += served
        if files and all(path.exists() for path in files):
            wanted[files] = None
    for files in wanted:
        try:
            uses += _asked_for(files, hub, env)
        except ManifestError as error:
            notes.append(f"{files[0]} cannot be used, so what it asks for is not known: {error.diagnostics[0].message}")
    return Uses(tuple(uses), tuple(notes))


def _served(folder: StateFolder) -> tuple[list[Use], tuple[Path, ...]]:
    """What the last generation has, and the files that its runner follows."""
    files: tuple[Path, ...] = ()
    try:
        if client.is_up(folder.control_socket):
            files = tuple(map(Path, client.request(folder.control_socket, "status")["manifests"]))
    except (MlxRunError, OSError, KeyError):
        pass
    found = load_committed(folder, ())
    if found is None:
        return [], files
    generation, desired = found
    uses = []
    for model in desired.models:
        where = f"{folder.name}: models.{model.name}"
        uses.append(Use(model.path, where))
        uses += [Use(adapter.path, f"{where}.adapters.{adapter.name}") for adapter in model.adapters]
        uses += [Use(model.draft.path, f"{where}.draft")] if model.draft is not None else []
    return uses, files or tuple(map(Path, generation.manifest))


def _asked_for(files: tuple[Path, ...], hub: Path, env: Mapping[str, str]) -> Iterator[Use]:
    for source in sources(load_manifest(files, env)):
        where = f"{files[-1].name}: {source.target}"
        if source.is_repository:
            yield Use(snapshot_folder(hub, source.text, source.branch), where)
        elif source.folder is not None:
            yield Use(source.folder, where)
