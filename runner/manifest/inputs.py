"""What a manifest was read from, and whether that is still so. Imports little: the runner, which watches, shares it."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Final

from runner.manifest.presence import is_folder

MAX_BYTES: Final = 1024 * 1024
"""The largest file that is read: a manifest, or what it names."""

LOCK_SUFFIX: Final = ".lock.yaml"
LOCK_BYTES: Final = 16 * MAX_BYTES
"""The largest lock file that is read: it has a line for each file of each model, and a program writes it."""

State = str | None
"""Tells one state of something from another; None while there is nothing that can be read."""


@dataclass(slots=True)
class Inputs:
    """Everything a manifest depends on, there or not, and the state it had when it was read.

    `files` are the manifest, its overlays and what they name, by content: a tool that touches one changes nothing, and
    no clock is too coarse to see a change. `folders` hold models and adapters, `patterns` are globs of such folders,
    both by what the file system says of their entries. Fills while a manifest is read, so that a reader that failed
    leaves what to watch.
    """

    files: dict[Path, State] = field(default_factory=dict)
    folders: dict[Path, State] = field(default_factory=dict)
    patterns: dict[str, State] = field(default_factory=dict)

    def read(self, path: Path) -> bytes:
        """At most MAX_BYTES + 1 bytes of a file (of a lock LOCK_BYTES + 1), so that one that is too large can be told.

        Raises OSError, also for a pipe or a device, which could keep its reader waiting.
        """
        self.files[path] = None
        content = _content(path)
        self.files[path] = _digest(content)
        return content

    def look(self, folder: Path) -> None:
        """Note a folder, before it is read."""
        self.folders[folder] = _folder_state(folder)

    def match(self, pattern: str) -> list[Path]:
        """The folders that an absolute pattern matches now, by name."""
        matches = _matches(pattern)
        self.patterns[pattern] = _matches_state(matches)
        return matches

    def now(self) -> Inputs:
        """The same things in their present state."""
        return Inputs(
            {path: _file_state(path) for path in self.files},
            {path: _folder_state(path) for path in self.folders},
            {pattern: _matches_state(_matches(pattern)) for pattern in self.patterns},
        )

    def folders_to_watch(self) -> tuple[Path, ...]:
        """The existing folders in which something happens when one of these changes."""
        found: dict[Path, None] = {}
        for path in (*self.files, *self.folders):
            found |= _along(path)
        for pattern in self.patterns:
            for path in _levels(pattern):
                found |= _along(path)
        return tuple(found)


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        parts: list[bytes] = []
        left = (LOCK_BYTES if path.name.endswith(LOCK_SUFFIX) else MAX_BYTES) + 1
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _file_state(path: Path) -> State:
    try:
        return _digest(_content(path))
    except (OSError, ValueError):
        return None


def _folder_state(path: Path) -> State:
    """By identity, size and times of the folder's entries: weights are too large to read them every second."""
    try:
        status = path.stat()
        inside = []
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path) as entries:
                inside = sorted((entry.name, *_version(_stat(entry))) for entry in entries)
    except (OSError, ValueError):
        return None
    return _digest(repr((status.st_ino, inside or _version(status))).encode())


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a dangling link, or a loop of them
        return entry.stat(follow_symlinks=False)


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Nobody can set the last of these back."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _matches(pattern: str) -> list[Path]:
    return [path for path in map(Path, sorted(glob(pattern))) if is_folder(path)]  # noqa: PTH207 - an absolute pattern


def _matches_state(matches: list[Path]) -> State:
    return _digest(repr([(str(path), _folder_state(path)) for path in matches]).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _levels(pattern: str) -> list[Path]:
    """Everything that is there of an absolute pattern's path, level by level: what appears in it may match."""
    parts = Path(pattern).parts
    fixed = next((at for at, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    levels = [str(Path(*parts[:end])) for end in range(fixed + 1, len(parts))]
    return [Path(*parts[:fixed]), *(match for level in [*levels, pattern] for match in _matches(level))]


def _along(path: Path) -> Mapping[Path, None]:
    """The folder of every symlink on the way to a path, the one it is in, and the path itself where it is a folder.

    Where there is none, the nearest above. A loop of links ends after 40 hops, as in the kernel.
    """
    found: dict[Path, None] = {}
    todo = list(reversed(path.parts))
    here = Path(todo.pop())
    hops = 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        target = _target(step) if hops < 40 else None
        if target is not None:
            hops += 1
            found[here] = None
            todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            here = Path(target.anchor) if target.is_absolute() else here
        elif is_folder(step):
            here = step
            if not todo:
                found[step.parent] = None
                found[step] = None
        else:
            found[here] = None
            break
    return found


def _target(path: Path) -> Path | None:
    """What a symlink says; None of anything else."""
    try:
        return path.readlink()
    except (OSError, ValueError):
        return None
