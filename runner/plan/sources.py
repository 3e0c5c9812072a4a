"""Every source that a manifest names, model by model: what it is called, and whether it is a folder or a repository."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runner.hub.jobs import Kind
from runner.manifest.checks import is_path
from runner.manifest.load import Loaded
from runner.manifest.lock import LockedSource
from runner.manifest.models import Adapter, Draft, Model
from runner.manifest.presence import from_home, is_folder
from runner.manifest.tree import KeyPath, dotted
from runner.plan.spec import Download


class Source(NamedTuple):
    """One source: the path of its entry, such as `("models", "chat", "draft")`, and what the manifest says of it.

    `at` is where its text is. It is a repository of the hub, or a `folder`, None where there is none of a bare name.
    `found`: a pattern of folders found it; then `text` is its path from the manifest's folder. `locked` is what the
    lock says of it. `code`: its Python files may be run.
    """

    path: KeyPath
    at: KeyPath
    text: str
    revision: str | None
    is_repository: bool
    folder: Path | None
    found: bool
    locked: LockedSource | None
    code: bool = False

    @property
    def branch(self) -> str:
        """The branch, tag or commit of a repository: the one that it is locked to, if it is."""
        return (self.locked.commit if self.locked is not None else "") or self.revision or "main"

    @property
    def kind(self) -> Kind:
        """What it is to be."""
        return "adapter" if self.path[2:3] == ("adapters",) else "model"

    @property
    def target(self) -> str:
        """Its path in words."""
        return dotted(self.path)


def sources(loaded: Loaded) -> Iterator[Source]:
    """All of them, in the manifest's order."""
    for name, model in loaded.manifest.models.items():
        for path, entry in entries(name, model):
            yield source_at(loaded, path, entry)


def entries(name: str, model: Model) -> Iterator[tuple[KeyPath, Model | Adapter | Draft]]:
    """A model, its adapters and its draft, with their paths in the manifest."""
    at: KeyPath = ("models", name)
    yield at, model
    for adapter, entry in model.adapters.items():
        yield (*at, "adapters", adapter), entry
    if model.draft is not None:
        yield (*at, "draft"), model.draft


def repositories(loaded: Loaded) -> list[Download]:
    """Every repository that a manifest names, in the cache or not, each once."""
    named: dict[tuple[str, str], list[Source]] = {}
    for source in sources(loaded):
        if source.is_repository:
            named.setdefault((source.text, source.branch), []).append(source)
    return [download(loaded, *key, found) for key, found in named.items()]


def download(
    loaded: Loaded, repo: str, revision: str, found: Sequence[Source], why: str = "", left: int | None = None
) -> Download:
    """What it takes to have a repository that is `found` at some places of the manifest; `left` bytes are to come."""
    hint = "it has to be downloaded first"
    place = loaded.at(found[0].at, why or f"{repo} ({revision})", hint, code="E604")
    kinds = tuple(sorted({source.kind for source in found}))
    targets = tuple(".".join(map(str, source.path)) for source in found)
    return Download(repo, revision, left, targets, kinds, any(source.code for source in found), place)


def source_at(loaded: Loaded, path: KeyPath, entry: Model | Adapter | Draft) -> Source:
    """The source of one entry."""
    at = (*path, "source") if (*path, "source") in loaded.tree.values else path
    found = path in loaded.found
    # A revision makes it a repository; else a folder of that name comes first.
    known = not found and entry.revision is not None and not is_path(entry.source)
    folder = None if known else _folder(loaded, at, entry.source)
    is_repository = known or (folder is None and not is_path(entry.source))
    text = f"./{os.path.relpath(entry.source, loaded.folder(at))}" if found else entry.source
    locked = loaded.pin(path, text, entry.revision)
    code = not isinstance(entry, Adapter) and entry.trust_remote_code
    return Source(path, at, text, entry.revision, is_repository, folder, found, locked, code)


def _folder(loaded: Loaded, at: KeyPath, source: str) -> Path | None:
    """Where a path leads, or None where a bare name is no folder. Links are kept: what they point to may change."""
    folder = loaded.folder(at) / from_home(source)
    if not source.startswith((".", "/", "~")) and not is_folder(folder):
        return None
    tidy = Path(os.path.normpath(folder))
    try:
        return tidy if tidy.samefile(folder) else folder
    except (OSError, ValueError):  # the latter where it holds a NUL
        return folder
