"""Files as they were when they were read: versions, and what was read from each.

What is read of a file is kept for as long as the file stays as it is, so a pass over folders that have not changed
costs a few `stat` calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from runner.manifest.suggest import suggest

T = TypeVar("T")

_RACY_NS: Final = 100_000_000
_RACY_WHOLE_SECONDS_NS: Final = 2_100_000_000


class BadFolder(Exception):  # noqa: N818 - says what a folder is, and becomes a diagnostic
    """The folder of a model or an adapter cannot be used (yet). `incomplete`: more files may still be coming; `code` is
    one of `runner.manifest.codes`."""

    def __init__(self, code: str, message: str, hint: str = "", *, incomplete: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.incomplete = incomplete


class FileVersion(NamedTuple):
    """What changes when a file does; nobody can set `ctime_ns` back. `blob` is the name of its blob in the hub's cache,
    which is its content's hash."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    blob: str = ""


class DigestCache:
    """What was read from files, by file version; bounded, the least recently used entries go first.

    A file that changed just before it was read could change again within the file system's clock tick, and look the
    same: what was read of it is not kept (git calls such an index entry racy). It can be
    pickled; threads cannot share one. `now` gives the time in nanoseconds. `whole` is for what was found in folders
    that may be half-written the next time; whoever fills it also empties it.
    """

    def __init__(self, max_entries: int = 65536, now: Callable[[], int] = time.time_ns) -> None:
        self._max_entries = max_entries
        self._now = now
        self._entries: OrderedDict[tuple[str, FileVersion | str], Any] = OrderedDict()
        self.whole: dict[Path, Any] = {}

    def remember(self, kind: str, version: FileVersion, read: Callable[[Path], T]) -> T:
        """`read(path)`, or what it gave before for this version of the file."""
        key = (kind, version)
        if key in self._entries:
            found: T = self._found(key)
            return found
        began = self._now()
        path = Path(version.path)
        value = read(path)
        if file_version(path) != version:
            message = f"{path.name} is being written"
            raise BadFolder("E603", message, "it is read again when it is complete", incomplete=True)
        changed = max(version.mtime_ns, version.ctime_ns)
        if began - changed > (_RACY_WHOLE_SECONDS_NS if changed % 1_000_000_000 == 0 else _RACY_NS):
            self._keep(key, value)
        return value

    def derive(self, kind: str, digest: str, make: Callable[[], T]) -> T:
        """`make()`, or what it gave before for what has this digest. What it raises is not kept."""
        key = (kind, digest)
        if key in self._entries:
            found: T = self._found(key)
            return found
        value = make()
        self._keep(key, value)
        return value

    def _found(self, key: tuple[str, FileVersion | str]) -> Any:
        self._entries.move_to_end(key)
        return self._entries[key]

    def _keep(self, key: tuple[str, FileVersion | str], value: Any) -> None:
        self._entries[key] = value
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)


def file_version(path: Path | str) -> FileVersion | None:
    """The version of a regular file, through links; None where there is none."""
    name = str(path)
    try:
        found = os.stat(name)  # noqa: PTH116 - ten times for each folder of a manifest: a Path costs as much again
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileVersion(name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, _blob(name))


def _blob(name: str) -> str:
    try:
        target = Path(os.readlink(name))  # noqa: PTH115 - as above
    except OSError:
        return ""
    return target.name if target.parent.name == "blobs" else ""


def list_files(folder: Path) -> dict[str, FileVersion]:
    """The regular files directly in a folder, links followed, without hidden ones. Raises BadFolder."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        hint = _near(folder) or "paths are relative to the manifest's folder"
        raise BadFolder("E601", f"there is no folder {folder}", hint) from None
    except NotADirectoryError:
        raise BadFolder("E601", f"{folder} is a file, not a folder", "give the folder it is in") from None
    except OSError as error:
        raise BadFolder("E601", f"{folder} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadFolder("E601", f"{str(folder)!r} is no path: {error}") from None
    within = str(folder / "x")[:-1]  # as `folder / name` has it, at a tenth of the price
    versions = {name: file_version(within + name) for name in names if not name.startswith(".")}
    return {name: version for name, version in versions.items() if version is not None}


def _near(folder: Path) -> str:
    """A folder beside it whose name is like it."""
    try:
        return suggest(folder.name, (entry.name for entry in os.scandir(folder.parent) if entry.is_dir()))
    except OSError:
        return ""


def json_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises BadFolder."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadFolder("E603", f"{path} is not a JSON object", "it may be half-written", incomplete=True)
    return found


def content_digest(path: Path) -> str:
    """Of all bytes of a file. Raises BadFolder."""
    return hashed(path, hashlib.blake2b(digest_size=16))


def hashed(path: Path, digest: Any) -> str:
    """What one of `hashlib`'s digests comes to with all bytes of a file. Raises BadFolder."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise BadFolder("E603", f"{path} cannot be read: {error.strerror}") from None
    said: str = digest.hexdigest()
    return said
