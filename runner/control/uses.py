"""Who uses what: the sources of every manifest that a runner of this user follows or followed last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from runner.control import client
from runner.control.copies import copies, place_of
from runner.control.ledger import load_committed
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError, MlxRunError
from runner.hub.cache import snapshot_folder
from runner.machine import this_machine
from runner.manifest.load import Loaded, load_manifest
from runner.plan.available import Available, Use, available, of_folder
from runner.plan.digests import DigestCache
from runner.plan.resolve import look
from runner.plan.sources import sources
from runner.plan.spec import ModelSpec


class Uses(NamedTuple):
    """`uses` are of sources, `copies` of what was made of them. `notes` say what could not be read, so that its uses
    may not all be known."""

    uses: tuple[Use, ...]
    notes: tuple[str, ...]
    copies: tuple[Use, ...] = ()


def known_uses(
    state: Path,
    hub: Path,
    converted: Path,
    manifests: Iterable[tuple[Path, ...]] = (),
    env: Mapping[str, str] = os.environ,
) -> Uses:
    """What the runners of a state folder serve, what the manifests that they follow ask for now, as they are locked or
    by branch, and what further `manifests` do. `converted` is where quantised copies are."""
    uses: list[Use] = []
    copied: list[Use] = []
    notes: list[str] = []
    wanted = dict.fromkeys(manifests)
    for name in sorted(path.name for path in state.iterdir() if path.is_dir()) if state.is_dir() else ():
        folder = StateFolder(state, name, create=False)
        served, packed, files = _served(folder, converted)
        uses += served
        copied += packed
        if files and all(path.exists() for path in files):
            wanted[files] = None
    for files in wanted:
        try:
            loaded = load_manifest(files, env)
            uses += _asked_for(loaded, hub)
            asked, unclear = _copies_asked_for(loaded, converted)
            copied += asked
            notes += unclear
        except ManifestError as error:
            notes.append(f"{files[0]} cannot be used, so what it asks for is not known: {error.diagnostics[0].message}")
    return Uses(tuple(uses), tuple(notes), tuple(copied))


def available_here(hub: Path, converted: Path, known: Uses) -> list[Available]:
    """What is in the hub's cache, the other folders that are used, and the quantised copies."""
    digests = DigestCache()
    places: dict[Path, list[str]] = {}
    for use in known.copies:
        places.setdefault(use.folder, []).append(use.where)
    found = available(hub, known.uses, digests)
    for copy in copies(converted):
        where = tuple(dict.fromkeys(places.get(copy.folder, ())))
        seen = of_folder(copy.folder, where, digests)
        found.append(replace(seen, kind="copy", source=copy.source or copy.folder.name, size=copy.size))
    return found


def _served(folder: StateFolder, converted: Path) -> tuple[list[Use], list[Use], tuple[Path, ...]]:
    """What the last generation has, its copies, and the files that its runner follows."""
    files: tuple[Path, ...] = ()
    try:
        if client.is_up(folder.control_socket):
            files = tuple(map(Path, client.request(folder.control_socket, "status")["manifests"]))
    except (MlxRunError, OSError, KeyError):
        pass
    found = load_committed(folder, ())
    if found is None:
        return [], [], files
    generation, desired = found
    uses = []
    for model in desired.models:
        where = f"{folder.name}: models.{model.name}"
        uses.append(Use(model.path, where))
        uses += [Use(adapter.path, f"{where}.adapters.{adapter.name}") for adapter in model.adapters]
        uses += [Use(model.draft.path, f"{where}.draft")] if model.draft is not None else []
    return uses, _copies(desired.models, converted, folder.name), files or tuple(map(Path, generation.manifest))


def _copies(models: Iterable[ModelSpec], converted: Path, where: str) -> list[Use]:
    packed = (model for model in models if model.quantization is not None)
    return [Use(place_of(converted, model), f"{where}: models.{model.name}") for model in packed]


def _copies_asked_for(loaded: Loaded, converted: Path) -> tuple[list[Use], list[str]]:
    """The copies of a manifest, and why those of some models are not known: only their files tell which they are."""
    wanted = {name for name, model in loaded.manifest.models.items() if model.quantization is not None}
    if not wanted:
        return [], []
    name = loaded.paths[-1].name
    seen = look(loaded, this_machine(), DigestCache())
    unclear = wanted - {model.name for model in seen.desired.models}
    notes = [f"{name} has models.{model}, which cannot be used, so its copy is not known" for model in sorted(unclear)]
    return _copies(seen.desired.models, converted, name), notes


def _asked_for(loaded: Loaded, hub: Path) -> Iterator[Use]:
    for source in sources(loaded):
        where = f"{loaded.paths[-1].name}: {source.target}"
        if source.is_repository:
            yield Use(snapshot_folder(hub, source.text, source.branch), where)
        elif source.folder is not None:
            yield Use(source.folder, where)
