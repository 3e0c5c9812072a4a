"""One file from the hub into the cache's `blobs`: resumed where it was cut, and there under its name only once its
content is what the hub says it is."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from huggingface_hub import constants, get_session, hf_hub_url

from runner.hub.client import NETWORK_ERRORS, Client, Failed, check
from runner.hub.jobs import Failure, File, Job

PARTIAL: Final = ".mlx-run.incomplete"
"""What a blob's name ends in while it is being fetched. The library never goes on from its own."""

_CHUNK: Final = 1 << 20


class Tally(Protocol):
    """Is told of bytes that are there; negative where they have to be fetched again."""

    def __call__(self, count: int, /) -> None: ...


class _Changed(Exception):  # noqa: N818 - a condition
    """The content is not what the hub lists."""


def fetch_blob(client: Client, job: Job, commit: str, file: File, blobs: Path, tally: Tally) -> None:
    """Bring a file into `blobs`; others that want the same one wait. Raises Failed, and OSError of the disk."""
    final = blobs / file.blob
    with _held(final) as partial:
        if partial is None:
            tally(file.size)
            return
        with partial.open("r+b") as stream:
            resumed = stream.seek(0, os.SEEK_END) > 0
            try:
                _fill(client, job, commit, file, stream, tally)
            except _Changed:
                # What was there before may be to blame, so what comes in one piece counts.
                tally(-_empty(stream))
                if not resumed:
                    raise Failed(_wrong(job, file)) from None
                try:
                    _fill(client, job, commit, file, stream, tally)
                except _Changed:
                    tally(-_empty(stream))
                    raise Failed(_wrong(job, file)) from None
            os.fsync(stream.fileno())
        partial.replace(final)


@contextmanager
def _held(final: Path) -> Iterator[Path | None]:
    """The partial file of a blob, there and locked; None where the blob itself is there by now."""
    partial = final.with_name(final.name + PARTIAL)
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if final.exists():
                partial.unlink(missing_ok=True)
                yield None
                return
            if _is(descriptor, partial):  # else who had it before has finished or removed it meanwhile
                yield partial
                return
        finally:
            os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _fill(client: Client, job: Job, commit: str, file: File, stream: Any, tally: Tally) -> None:
    """Complete the partial file. Raises _Changed where the whole of it is not as listed."""
    digest = hasher(file)
    held = _read_on(stream, file, digest)
    tally(held)
    got = _Got(stream, digest, held, tally)
    url = hf_hub_url(job.repo, file.name, revision=commit)
    if got.size < file.size:
        client.patiently(job, lambda: _request(client, url, file, got), got.progressed)
    if got.size != file.size or got.digest.hexdigest() != file.blob:
        raise _Changed


def _read_on(stream: Any, file: File, digest: Any) -> int:
    """Digest what is there; more than there should be is thrown away."""
    if stream.seek(0, os.SEEK_END) > file.size:
        _empty(stream)
    stream.seek(0)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    size: int = stream.tell()
    return size


class _Got:
    """What came of a file so far."""

    def __init__(self, stream: Any, digest: Any, size: int, tally: Tally) -> None:
        self.stream = stream
        self.digest = digest
        self.size = size
        self._tally = tally
        self._seen = size

    def add(self, chunk: bytes) -> None:
        self.stream.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)
        self._tally(len(chunk))

    def again(self, digest: Any) -> None:
        """From the start: the hub does not go on where it was cut."""
        self._tally(-self.size)
        _empty(self.stream)
        self.digest, self.size, self._seen = digest, 0, 0

    def progressed(self) -> bool:
        """Whether anything came since this was asked last."""
        before, self._seen = self._seen, self.size
        return self.size > before


def _request(client: Client, url: str, file: File, got: _Got) -> None:
    headers = client.headers()
    if got.size:
        headers["Range"] = f"bytes={got.size}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        check(response)
        if got.size and response.status_code != 206:
            got.again(hasher(file))
        try:
            for chunk in response.iter_bytes():
                if got.size + len(chunk) > file.size:
                    raise _Changed
                got.add(chunk)
        finally:
            got.stream.flush()
    if got.size < file.size:
        raise NETWORK_ERRORS[0](f"{file.name} ended {file.size - got.size} bytes early")


def hasher(file: File) -> Any:
    """A digest of the kind that the hub lists of a file, before its content: of what is not in LFS it is git's."""
    if file.digest.startswith("sha256:"):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size)  # noqa: S324 - git's, and the hub's name for it


def matches(path: Path, file: File) -> bool:
    """Whether a file that is there has the content that the hub lists, read from start to end. Raises OSError."""
    if path.stat().st_size != file.size:
        return False
    digest = hasher(file)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    same: bool = digest.hexdigest() == file.blob
    return same


def _empty(stream: Any) -> int:
    """Throw away what is there. Returns how much it was."""
    size: int = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    stream.truncate()
    return size


def _wrong(job: Job, file: File) -> Failure:
    message = f"{job} cannot be had: {file.name} is not what the hub lists, twice ({file.digest[:19]}… is)"
    hint = "a proxy may change what comes through; try again, or another network"
    return Failure(job.repo, job.revision, "E806", message, hint, passing=True)


def disk_failure(job: Job, error: OSError, cache: Path) -> Failure:
    """Why a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, hint = (
            f"the disk of {cache} is full",
            "make room (`mlx-run models prune`), or set HF_HOME to a larger disk",
        )
    else:
        what = f"{error.filename or cache} cannot be written: {error.strerror or error}"
        hint = "check its owner and permissions, or set HF_HOME to another folder"
    return Failure(job.repo, job.revision, "E805", f"{job} cannot be had: {what}", hint)
