"""Makes the content of a lock file, and tells how one differs from the manifest and from what is on the disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

from runner.errors import ManifestError
from runner.hub.cache import snapshot
from runner.hub.jobs import Listing
from runner.hub.needs import needed
from runner.inspect.files import BadFolder, DigestCache, list_files
from runner.manifest.load import Loaded
from runner.manifest.lock import Lock, LockedFile, LockedSource, lock_path
from runner.plan.pinned import changes, digest_of
from runner.plan.sources import Source, download, sources
from runner.plan.spec import Download

Ask = Callable[[list[Download]], Mapping[tuple[str, str], Listing]]
"""What repositories hold at a revision, from the hub."""

_OF_THE_TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenization*.py",
)


class Difference(NamedTuple):
    """One thing that a lock file has otherwise. `target` is the source's dotted path, empty for the file as a whole."""

    target: str
    message: str

    def __str__(self) -> str:
        return f"{self.target}: {self.message}" if self.target else self.message


def make_lock(
    loaded: Loaded, hub: Path, cache: DigestCache, ask: Ask | None, upgrade: Collection[str] | None = ()
) -> dict[str, LockedSource]:
    """Every source of a manifest, by path. What is locked already and still asked for stays; of the models in `upgrade`
    (None: all) and of what is new, the hub is asked what their branches mean now; without `ask` the cache is. Whether a
    source's Python files are locked is as the manifest says, and moves no commit.

    Raises ManifestError where a folder cannot be read or a repository is not in the cache, and what `ask` does.
    """
    found = list(sources(loaded))
    new = {source.target: at for source in found if (at := _to_be_locked(source, upgrade))}
    unknown = [it for it in found if it.target in new and ask is not None and not _is_here(it, new[it.target], hub)]
    listed = ask(_downloads(loaded, unknown, new)) if ask is not None and unknown else {}
    made: dict[str, LockedSource] = {}
    for source in found:
        if not source.is_repository:
            made[source.target] = _of_folder(loaded, source, cache)
        elif source in unknown:
            made[source.target] = _of_listing(source, listed[source.text, new[source.target]])
        elif source.target in new:
            made[source.target] = _of_cache(loaded, source, new[source.target], hub, cache)
        else:
            assert source.locked is not None, "what is not locked is new"
            made[source.target] = source.locked
    return made


def _to_be_locked(source: Source, upgrade: Collection[str] | None) -> str:
    """The revision at which a source is to be locked; empty where it is a folder, or stays as it is locked."""
    if not source.is_repository:
        return ""
    if source.locked is None or upgrade is None or str(source.path[1]) in upgrade:
        return source.revision or "main"
    return source.locked.commit if source.code != source.locked.code else ""


def _is_here(source: Source, revision: str, hub: Path) -> bool:
    """A commit that is in the cache tells everything itself; but it may have come without its code."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None and not source.code and _held(source, revision, hub)


def _held(source: Source, commit: str, hub: Path) -> bool:
    return snapshot(hub, source.text, commit) is not None


def _downloads(loaded: Loaded, new: list[Source], revisions: Mapping[str, str]) -> list[Download]:
    """By what the manifest says, not by what they are locked to."""
    named: dict[tuple[str, str], list[Source]] = {}
    for source in new:
        named.setdefault((source.text, revisions[source.target]), []).append(source)
    return [download(loaded, *key, found) for key, found in named.items()]


def _of_listing(source: Source, listed: Listing) -> LockedSource:
    names = needed([file.name for file in listed.files], (source.kind,), code=source.code)
    files = {file.name: LockedFile(file.size, file.digest) for file in listed.files if file.name in names}
    return _locked(source, listed.commit, files)


def _of_cache(loaded: Loaded, source: Source, revision: str, hub: Path, cache: DigestCache) -> LockedSource:
    folder = snapshot(hub, source.text, revision)
    if folder is None:
        message = f"{source.text} ({revision}) is not in the hub's cache, and the hub is not to be asked"
        hint = "unset HF_HUB_OFFLINE, or fetch it elsewhere and bring the cache along"
        raise ManifestError([loaded.at(source.at, message, hint, code="E801")])
    return _locked(source, folder.name, _files(loaded, source, folder, cache))


def _of_folder(loaded: Loaded, source: Source, cache: DigestCache) -> LockedSource:
    if source.folder is None:
        hint = "a path begins with ./ or ../, a Hugging Face repository is org/name"
        message = f'there is no folder "{source.text}" beside the manifest'
        raise ManifestError([loaded.at(source.at, message, hint, code="E601")])
    return _locked(source, "", _files(loaded, source, source.folder, cache))


def _files(loaded: Loaded, source: Source, folder: Path, cache: DigestCache) -> dict[str, LockedFile]:
    """Of a folder or a snapshot, as the hub would list them. What is in the cache is named by its digest."""
    made: dict[str, LockedFile] = {}
    try:
        there = list_files(folder)
        for name in needed(there, (source.kind,), code=source.code):
            version = there[name]
            kind = {64: "sha256", 40: "git"}.get(len(version.blob))
            digest = f"{kind}:{version.blob}" if kind is not None else digest_of(version, "sha256", cache)
            made[name] = LockedFile(version.size, digest)
    except BadFolder as error:
        raise ManifestError([loaded.at(source.at, error.message, error.hint, code=error.code)]) from None
    return made


def _locked(source: Source, commit: str, files: dict[str, LockedFile]) -> LockedSource:
    tokenizer = "" if source.kind == "adapter" else _tokenizer(files)
    return LockedSource(source.text, source.revision, commit, tokenizer, files, source.code)


def _tokenizer(files: Mapping[str, LockedFile]) -> str:
    """A digest of the digests of the files that turn text into tokens."""
    names = sorted(name for name in files if any(fnmatchcase(name, pattern) for pattern in _OF_THE_TOKENIZER))
    lines = "".join(f"{name} {files[name].digest}\n" for name in names)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}" if names else ""


def differences(loaded: Loaded, hub: Path, cache: DigestCache) -> Iterator[Difference]:
    """What a lock file has otherwise than the manifest, and than the disk. Everything that is here is read."""
    if loaded.lock is None:
        yield Difference("", f"there is no {lock_path(loaded.paths).name}; write it with `mlx-run lock`")
        return
    asked = list(sources(loaded))
    for source in asked:
        yield from _different(source, loaded.lock, hub, cache)
    for target in loaded.lock.sources.keys() - {source.target for source in asked}:
        yield Difference(target, "is in the lock, and not in the manifest")


def _different(source: Source, lock: Lock, hub: Path, cache: DigestCache) -> Iterator[Difference]:
    held = lock.sources.get(source.target)
    if held is None:
        yield Difference(source.target, "is not in the lock")
    elif source.locked is None:
        yield Difference(source.target, f"is {_named(held)} in the lock, and {_asked(source)} in the manifest")
    elif source.code != held.code:
        having = "has its Python files, which it may not run" if held.code else "does not have its Python files"
        yield Difference(source.target, f"the lock {having}")
    elif source.is_repository:
        folder = snapshot(hub, source.text, held.commit)
        if folder is not None:
            damage = changes(held, source, folder, cache, thorough=True)
            yield from (Difference(source.target, f"in the hub's cache {found}") for found in damage)
    elif source.folder is not None:
        changed = changes(held, source, source.folder, cache, thorough=True)
        yield from (Difference(source.target, found) for found in changed)


def _named(held: LockedSource) -> str:
    return held.source if held.revision is None else f"{held.source} ({held.revision})"


def _asked(source: Source) -> str:
    return source.text if source.revision is None else f"{source.text} ({source.revision})"


def moved(before: Lock | None, after: Mapping[str, LockedSource]) -> Iterator[Difference]:
    """What a new lock has otherwise than the one before, in words."""
    old = before.sources if before is not None else {}
    for target, held in after.items():
        was = old.get(target)
        if was is None:
            yield Difference(target, f"{_named(held)} is {_state(held)}")
        elif was != held:
            yield Difference(target, f"{_state(was)} → {_state(held)}")
    yield from (Difference(target, "is gone") for target in old if target not in after)


def _state(held: LockedSource) -> str:
    if held.commit:
        return f"{held.source}@{held.commit[:12]}" + " with its Python files" * held.code
    return f"{len(held.files)} files of {held.source}, {_digest(held)[:12]}"


def _digest(held: LockedSource) -> str:
    """One digest for all files of a source."""
    text = "".join(f"{name} {file.digest}\n" for name, file in sorted(held.files.items()))
    return hashlib.sha256(text.encode()).hexdigest()
