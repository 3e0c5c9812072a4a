"""Whether the files of a source are those that were locked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from runner.hub.needs import CODE, needed
from runner.inspect.files import BadFolder, DigestCache, FileVersion, hashed, list_files
from runner.manifest.load import Loaded
from runner.manifest.lock import LockedFile, LockedSource, lock_path
from runner.manifest.tree import Problem
from runner.plan.sources import Source

_SMALL: Final = 4 * 2**20
"""Bytes. Files up to here are read at every look; their digests are kept while they stay as they are."""


def check_files(loaded: Loaded, source: Source, folder: Path, cache: DigestCache) -> Iterator[Problem]:
    """What a source's lock has against its files, as errors (E…) and warnings (W…).

    A repository's files are told by the names of their blobs, which are digests that were checked when they came, and
    small ones by their content as well. A folder's large files are told by their sizes, or, where the lock is frozen,
    by their content.
    """
    if source.locked is None:
        return
    changed = list(changes(source.locked, source, folder, cache, thorough=loaded.frozen))
    if not changed:
        return
    what = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    name = lock_path(loaded.paths).name
    if source.is_repository:
        message = f"{source.text} is not what {name} says: {what}"
        hint = "`mlx-run pull --verify` fetches it again; `mlx-run lock --upgrade` takes it as it is"
        yield Problem("E813", source.at, message, hint)
    elif loaded.frozen:
        yield Problem("E813", source.at, f"has changed since it was locked: {what}", "`mlx-run lock` takes it as it is")
    else:
        hint = "`mlx-run lock` takes it as it is"
        yield Problem("W812", source.at, f"has changed since it was locked, and goes live as it is: {what}", hint)


def check_locked(loaded: Loaded, source: Source) -> Iterator[Problem]:
    """Whether the lock has this very source, as `check_files` has it; no file is looked at."""
    name = lock_path(loaded.paths).name
    if source.locked is not None:
        if source.code and not source.locked.code:
            yield _unlocked(loaded, source, f"may run its Python files, and {name} does not have them")
        return
    if loaded.lock is None:
        if loaded.frozen:
            yield Problem(
                "E812", (), f"there is no {name}, and nothing goes on without it", "write it with `mlx-run lock`"
            )
        return
    held = loaded.lock.sources.get(source.target)
    if held is None:
        what = f"is not in {name}"
    else:
        what = f"is {_named(held.source, held.revision)} in {name}, and {_named(source.text, source.revision)} here"
    yield _unlocked(loaded, source, what)


def _unlocked(loaded: Loaded, source: Source, what: str) -> Problem:
    if loaded.frozen:
        return Problem("E812", source.at, what, "bring the lock up to date with `mlx-run lock`")
    return Problem("W811", source.at, f"{what}: it is taken as it comes", "bring it up to date with `mlx-run lock`")


def _named(source: str, revision: str | None) -> str:
    return source if revision is None else f"{source} ({revision})"


def changes(locked: LockedSource, source: Source, folder: Path, cache: DigestCache, *, thorough: bool) -> Iterator[str]:
    """In words, which files of a folder are not as locked, gone or new. `thorough`: large ones are read, too. Python
    files count where both the manifest and the lock want them."""
    code = source.code and locked.code
    expected = {name: file for name, file in locked.files.items() if code or not fnmatchcase(name, CODE)}
    try:
        there = list_files(folder)
    except BadFolder:
        there = {}
    for name, file in expected.items():
        version = there.get(name)
        if version is None:
            yield f"{name} is gone"
        elif version.size != file.size:
            yield f"{name} is another"
        else:
            try:
                same = _same(version, file, cache, thorough=thorough)
            except BadFolder as error:  # it is being written, or cannot be read
                yield error.message
            else:
                if not same:
                    yield f"{name} is another"
    yield from (f"{name} is new" for name in needed(there, (source.kind,), code=code) if name not in expected)


def _same(version: FileVersion, file: LockedFile, cache: DigestCache, *, thorough: bool) -> bool:
    in_cache = len(version.blob) in (40, 64)
    if in_cache and file.digest.partition(":")[2] != version.blob and file.digest.startswith(_kind_of(version.blob)):
        return False
    if version.size > _SMALL and not (thorough and not in_cache):
        return True
    return digest_of(version, file.digest.partition(":")[0], cache) == file.digest


def _kind_of(blob: str) -> str:
    return "sha256:" if len(blob) == 64 else "git:"


def digest_of(version: FileVersion, kind: str, cache: DigestCache) -> str:
    """The digest of a file's content, as locks have it: `kind` is sha256 or git. Raises BadFolder."""

    def read(path: Path) -> str:
        digest: Any = hashlib.sha256()
        if kind == "git":
            digest = hashlib.sha1(b"blob %d\0" % version.size)  # noqa: S324 - git's
        return f"{kind}:{hashed(path, digest)}"

    return cache.remember(kind, version, read)
