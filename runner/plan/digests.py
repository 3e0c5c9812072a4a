"""What stands for the files of a model or an adapter: digests that are cheap to take again on every pass.

A model's weights are known by what the file system (or the hub's cache) says of the files, so 100 GB cost a few
`stat` calls; everything small, and adapters, by content. Contents are read once for each version of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")

_SMALL_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_MAX_HEADER_BYTES: Final = 100_000_000  # as the safetensors library has it
_RACY_NS: Final = 100_000_000
_RACY_WHOLE_SECONDS_NS: Final = 2_100_000_000


class BadFolder(Exception):  # noqa: N818 - says what a folder is, and never leaves this package
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


@dataclass(frozen=True, slots=True)
class FolderDigest:
    """`weights_bytes` is what the weights take in memory, by their headers."""

    digest: str
    weights_bytes: int


class DigestCache:
    """What was read from files, by file version; bounded, the least recently used entries go first.

    A file that changed just before it was read could change again within the file system's clock tick, and look the
    same: what was read of it is not kept (git calls such an index entry racy). It can be
    pickled; threads cannot share one. `now` gives the time in nanoseconds.
    """

    def __init__(self, max_entries: int = 8192, now: Callable[[], int] = time.time_ns) -> None:
        self._max_entries = max_entries
        self._now = now
        self._entries: OrderedDict[tuple[str, FileVersion], Any] = OrderedDict()

    def remember(self, kind: str, version: FileVersion, read: Callable[[Path], T]) -> T:
        """`read(path)`, or what it gave before for this version of the file."""
        key = (kind, version)
        if key in self._entries:
            self._entries.move_to_end(key)
            found: T = self._entries[key]
            return found
        began = self._now()
        path = Path(version.path)
        value = read(path)
        if file_version(path) != version:
            message = f"{path.name} is being written"
            raise BadFolder("E603", message, "it is read again when it is complete", incomplete=True)
        changed = max(version.mtime_ns, version.ctime_ns)
        if began - changed > (_RACY_WHOLE_SECONDS_NS if changed % 1_000_000_000 == 0 else _RACY_NS):
            self._entries[key] = value
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        return value


def file_version(path: Path) -> FileVersion | None:
    """The version of a regular file, through links; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileVersion(str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, _blob(path))


def _blob(path: Path) -> str:
    try:
        target = path.readlink()
    except OSError:
        return ""
    return target.name if target.parent.name == "blobs" else ""


def model_digest(folder: Path, cache: DigestCache) -> FolderDigest:
    """The digest of a model folder.

    Raises BadFolder where config.json or weights are missing, or a weight file is not whole.
    """
    files = _files(folder)
    if "config.json" not in files:
        raise BadFolder("E602", f"{folder} holds no config.json", "a model folder has config.json and *.safetensors")
    weights = {name for name in files if name.startswith("model") and name.endswith(".safetensors")}
    if not weights:
        message = f"{folder} holds no model*.safetensors"
        raise BadFolder("E602", message, "convert the model with mlx_lm.convert", incomplete=True)
    missing = _indexed(files, cache) - files.keys()
    if missing:
        message = f"{folder} lacks {len(missing)} of the files in its index, such as {min(missing)}"
        raise BadFolder("E602", message, "download or copy it again", incomplete=True)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        version = files[name]
        if name in weights:
            _update(digest, name, version.blob or f"{version.size} {version.mtime_ns} {version.inode}")
        elif name.endswith(_SMALL_SUFFIXES):
            _update(digest, name, version.blob or cache.remember("content", version, _content_digest))
    return FolderDigest(digest.hexdigest(), _weights_bytes((files[name] for name in weights), cache))


def adapter_digest(folder: Path, cache: DigestCache) -> FolderDigest:
    """The digest of an adapter's folder: of the contents of its configuration and of the weights that go with it.

    Those are PEFT's `adapter_model.safetensors` where the configuration has a `peft_type`, else mlx-lm's
    `adapters.safetensors`; checkpoints beside them do not count. Raises BadFolder where one of the two files is
    missing, or not whole.
    """
    files = _files(folder)
    config = files.get("adapter_config.json")
    if config is None:
        raise BadFolder("E602", f"{folder} holds no adapter_config.json", "an adapter folder has it beside its weights")
    name = cache.remember("adapter weights", config, _adapter_weights)
    weights = files.get(name)
    if weights is None:
        raise BadFolder("E602", f"{folder} holds no {name}", "its adapter_config.json asks for it", incomplete=True)
    size = _weights_bytes([weights], cache)
    digest = hashlib.blake2b(digest_size=16)
    for version in (config, weights):
        _update(digest, version.path.rpartition("/")[2], cache.remember("content", version, _content_digest))
    return FolderDigest(digest.hexdigest(), size)


def _files(folder: Path) -> dict[str, FileVersion]:
    """The regular files directly in a folder, links followed, without hidden ones."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        raise BadFolder("E601", f"there is no folder {folder}", "paths are relative to the manifest's folder") from None
    except NotADirectoryError:
        raise BadFolder("E601", f"{folder} is a file, not a folder", "give the folder it is in") from None
    except OSError as error:
        raise BadFolder("E601", f"{folder} cannot be read: {error.strerror}") from None
    versions = {name: file_version(folder / name) for name in names if not name.startswith(".")}
    return {name: version for name, version in versions.items() if version is not None}


def _indexed(files: dict[str, FileVersion], cache: DigestCache) -> set[str]:
    index = files.get("model.safetensors.index.json")
    return cache.remember("index", index, _index_files) if index is not None else set()


def _index_files(path: Path) -> set[str]:
    weight_map = _json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadFolder("E603", f"{path} has no weight_map", "download or copy it again")
    return {str(name) for name in weight_map.values()}


def _adapter_weights(path: Path) -> str:
    return "adapter_model.safetensors" if "peft_type" in _json_object(path) else "adapters.safetensors"


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadFolder("E603", f"{path} is not a JSON object", "it may be half-written", incomplete=True)
    return found


def _weights_bytes(versions: Iterable[FileVersion], cache: DigestCache) -> int:
    return sum(cache.remember("header", version, tensor_bytes) for version in versions)


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors in a safetensors file, from its header: 8 bytes of length, little-endian, then JSON.

    Raises BadFolder where the header does not fit the file, as while it is being written.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                message = f"{path} is no whole safetensors file"
                raise BadFolder("E603", message, "it may be half-written", incomplete=True)
            header = json.loads(file.read(length))
        spans = [tuple(tensor["data_offsets"]) for name, tensor in header.items() if name != "__metadata__"]
        end = max((stop for _, stop in spans), default=0)
        total = sum(stop - start for start, stop in spans)
    except OSError as error:
        raise BadFolder("E603", f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message = f"{path} has no safetensors header"
        raise BadFolder("E603", message, "it may be half-written", incomplete=True) from None
    if size != 8 + length + end:
        message = f"{path} has {size} bytes where its header says {8 + length + end}"
        raise BadFolder("E603", message, "it may be half-written", incomplete=True)
    return int(total)


def _content_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise BadFolder("E603", f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, name: str, value: str) -> None:
    digest.update(f"{name}\0{value}\n".encode())
