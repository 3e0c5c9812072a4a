"""What a sound manifest may want to hear: warnings, which keep nothing from running."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from runner.errors import Diagnostic
from runner.manifest.checks import is_loopback, is_path
from runner.manifest.load import Loaded
from runner.manifest.models import Adapter, Draft, Model
from runner.manifest.presence import is_folder
from runner.manifest.tree import KeyPath

_COMMIT: Final = r"[0-9a-f]{40}"


def advise(loaded: Loaded) -> list[Diagnostic]:
    """Warnings, in the order of the files. The file system is asked one thing: whether `org/name` is a folder here."""
    manifest = loaded.manifest
    found: list[Diagnostic] = [*loaded.warnings]
    for name, server in manifest.servers.items():
        if server.auth is not None and server.auth.allow_unauthenticated and not is_loopback(server.host):
            path: KeyPath = ("servers", name, "auth", "allow_unauthenticated")
            message = f"everybody who reaches {server.host}:{server.port} may use this server"
            found.append(_warning(loaded, "W501", path, message, "give api_keys instead"))
    for name, model in manifest.models.items():
        at: KeyPath = ("models", name)
        entries: list[tuple[KeyPath, Model | Adapter | Draft]] = [(at, model)]
        entries += [((*at, "adapters", adapter), entry) for adapter, entry in model.adapters.items()]
        entries += [((*at, "draft"), model.draft)] if model.draft else []
        for path, entry in entries:
            found += [*_unpinned(loaded, path, entry), *_left_behind(loaded, path, entry)]
            found += _trusting(loaded, path, entry)
    return loaded.tree.in_order(found)


def _left_behind(loaded: Loaded, path: KeyPath, entry: Model | Adapter | Draft) -> Iterator[Diagnostic]:
    """A revision of another repository: that of the source which an overlay replaced."""
    if entry.revision is None or len(loaded.paths) == 1:
        return
    source, revision = (loaded.tree.place((*path, key)).source for key in ("source", "revision"))
    if loaded.tree.sources.index(revision) < loaded.tree.sources.index(source):
        message = f"is from {revision.name}, but the source from {source.name}: a commit of another repository?"
        hint = f"give {source.name} a revision too, or revision: !reset"
        yield _warning(loaded, "W602", (*path, "revision"), message, hint)


def _trusting(loaded: Loaded, path: KeyPath, entry: Model | Adapter | Draft) -> Iterator[Diagnostic]:
    if not isinstance(entry, Adapter) and entry.trust_remote_code:
        message = f"the Python code that {entry.source} brings runs with all that you may do"
        hint = "read it, and lock its commit; remove this where the model needs no code of its own"
        yield _warning(loaded, "W614", (*path, "trust_remote_code"), message, hint)


def _unpinned(loaded: Loaded, path: KeyPath, entry: Model | Adapter | Draft) -> Iterator[Diagnostic]:
    if not _is_on_the_hub(loaded, path, entry) or re.fullmatch(_COMMIT, entry.revision or ""):
        return
    if loaded.pin(path, entry.source, entry.revision) is not None:
        return
    at = (*path, "source" if entry.revision is None else "revision")
    message = f"{entry.source} ({entry.revision or 'main'}) can become another version, since it is no commit"
    yield _warning(
        loaded, "W601", at, message, "run `mlx-run lock`, or give revision: and the 40 hex digits of a commit"
    )


def _is_on_the_hub(loaded: Loaded, path: KeyPath, entry: Model | Adapter | Draft) -> bool:
    """As `runner.plan.resolve` has it: a revision makes it a repository, else a folder of that name comes first."""
    if is_path(entry.source):
        return False
    return entry.revision is not None or not is_folder(loaded.folder((*path, "source")) / entry.source)


def _warning(loaded: Loaded, code: str, path: KeyPath, message: str, hint: str) -> Diagnostic:
    return loaded.at(path, message, hint, code=code)._replace(severity="warning")
