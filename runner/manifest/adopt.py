"""Writes into a manifest's files what the admin API changed: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.errors import ManifestError, RunnerError
from runner.manifest.drift import Changes, taken_away
from runner.manifest.edit import CannotEdit, NotWritten, add_item, drop_item, put, remove
from runner.manifest.inputs import Inputs
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.models import Manifest
from runner.manifest.source import Source, read_source


@dataclass(frozen=True, slots=True)
class Adopted:
    """One file, before and after."""

    path: Path
    before: str
    after: str


def adopt(paths: Sequence[Path], env: Mapping[str, str], changes: Changes) -> list[Adopted]:
    """What the files have to become for the manifest to say what the changes made of it; only those that differ.

    Additions go into the first file, since their paths are relative to it; what goes, goes from every file that has it.
    The result was read back, and is exactly the manifest that was meant. Raises ManifestError where the files, as they
    are now, cannot be used, and RunnerError where they cannot be edited like that.
    """
    now = load_manifest(paths, env)
    files = [read_source(path, Inputs()) for path in paths]
    before = [file.text for file in files]
    try:
        _edit(files, now, changes)
        after = load_manifest(paths, env, _Edited({f.path: f.text for f in files})).manifest
    except (CannotEdit, ManifestError) as error:
        reason = str(error).splitlines()[0]
        raise RunnerError(f"the manifest cannot take this over: {reason}", hint=_BY_HAND) from None
    if after.model_dump() != _meant(paths, env, changes):
        raise RunnerError("the manifest would come to something else than what runs", hint=_BY_HAND)
    return [Adopted(f.path, old, f.text) for f, old in zip(files, before, strict=True) if f.text != old]


_BY_HAND = "Nothing was written. Edit the file by hand; `mlx-run plan` shows what differs."


@dataclass(slots=True)
class _Edited(Inputs):
    """Reads files as they are to be."""

    texts: Mapping[Path, str] = field(default_factory=dict)

    def __init__(self, texts: Mapping[Path, str]) -> None:
        Inputs.__init__(self)
        self.texts = texts

    def read(self, path: Path) -> bytes:
        """The text to be, or what is there."""
        return self.texts[path].encode() if path in self.texts else Inputs.read(self, path)


def _edit(files: list[Source], now: Loaded, changes: Changes) -> None:
    """Change `files` in place. Raises CannotEdit."""
    changes = _literal(changes)
    for name, entry in changes.models.items():
        files[0] = put(files[0], ("models", name), _whole_entry(changes, name, entry))
        for server in changes.servers.get(name, ()):
            if now.manifest.servers[server].models is not None:
                _list(files, ("servers", server, "models"), name)
    for name in changes.unloaded:
        _everywhere(files, ("models", name), remove)
        for server, declared in now.manifest.servers.items():
            if name in (declared.models or ()):
                _everywhere(files, ("servers", server, "models"), partial(drop_item, item=name))
    for (model, name), added in changes.adapters.items():
        if model in changes.models:
            continue
        at = ("models", model, "adapters", name)
        if added is None:
            if at in now.found:
                raise CannotEdit(f"the adapter {name} of {model} is found by a pattern: move its folder away")
            _everywhere(files, at, remove)
        else:
            files[0] = put(files[0], at, _short(added))


def _literal(changes: Changes) -> Changes:
    """With every dollar sign doubled: in a manifest it would begin a variable, and in the API it does not."""

    def doubled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("$", "$$")
        if isinstance(value, Mapping):
            return {key: doubled(one) for key, one in value.items()}
        return [doubled(one) for one in value] if isinstance(value, list | tuple) else value

    return replace(changes, models=doubled(changes.models), adapters=doubled(changes.adapters))


def _whole_entry(changes: Changes, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An added model with what was loaded onto it, and without what was taken off."""
    taken = taken_away(changes, name)
    adapters = {adapter: one for adapter, one in (entry.get("adapters") or {}).items() if adapter not in taken}
    adapters |= {at[1]: _short(one) for at, one in changes.adapters.items() if at[0] == name and one is not None}
    return {**entry, "adapters": adapters} if adapters or "adapters" in entry else dict(entry)


def _short(entry: Mapping[str, Any]) -> Any:
    return entry["source"] if set(entry) == {"source"} else dict(entry)


def _everywhere(files: list[Source], path: tuple[str, ...], edit: Callable[[Source, tuple[str, ...]], Source]) -> None:
    """Take something out of every file that has it."""
    found = False
    for at, file in enumerate(files):
        try:
            files[at] = edit(file, path)
        except NotWritten:
            continue
        found = True
    if not found:
        raise CannotEdit(f"{'.'.join(path)} is written in none of its files")


def _list(files: list[Source], path: tuple[str, ...], name: str) -> None:
    """Add to the list of the last file that has one: it replaces those of earlier files."""
    for at in reversed(range(len(files))):
        with contextlib.suppress(NotWritten):
            files[at] = add_item(files[at], path, name)
            return
    raise CannotEdit(f"{'.'.join(path)} is written in none of its files")


def _meant(paths: Sequence[Path], env: Mapping[str, str], changes: Changes) -> dict[str, Any]:
    """The manifest with the changes, as plain data."""
    manifest: Manifest = load_manifest(paths, env, changes=changes).manifest
    data = manifest.model_dump()
    for name in changes.unloaded:
        del data["models"][name]
    for model, name in (at for at, entry in changes.adapters.items() if entry is None):
        data["models"][model]["adapters"].pop(name)
    for server, declared in data["servers"].items():
        if declared["models"] is not None:
            models = [name for name in declared["models"] if name not in changes.unloaded]
            models += [name for name, servers in changes.servers.items() if server in servers and name not in models]
            declared["models"] = models
    return data
