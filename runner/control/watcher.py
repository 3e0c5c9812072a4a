"""Notices that a file which matters has changed, however it was changed.

File events wake it early; a look at every file once a second is the net below, because events go missing when an
editor renames, a symlink is swapped or a folder is replaced. Either way only the files' state counts, never an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

QUIET = 0.1
"""Seconds a file must stay as it is before it is read: editors and copies write in pieces."""

POLL = 1.0
"""Seconds between looks without an event."""

Signature = tuple[tuple[object, ...], ...]


class Subject(Protocol):
    """What is kept in step with its files; `runner.control.reconciler.Reconciler` is."""

    files: tuple[Path, ...]

    def prepare(self) -> None:
        """A pass is coming, once the files have settled."""
        ...

    async def reconcile(self) -> Any:
        """Read everything again and act on it."""
        ...

    def retry_delay(self) -> float | None:
        """Seconds until another try is due though nothing changed; None when none is."""
        ...


class Watcher:
    """Runs a pass of its subject after every change of the subject's files."""

    def __init__(self, reconciler: Subject) -> None:
        self._reconciler = reconciler
        self._woken = asyncio.Event()
        self._stop_events = asyncio.Event()
        self._events: asyncio.Task[None] | None = None
        self._watching: tuple[tuple[Path, int], ...] = ()

    async def run(self, seen: Signature) -> None:
        """Watch until cancelled. `seen` is the files' signature from before they were last read."""
        try:
            retry_at: float | None = None
            while True:
                self._follow(watched_folders(self._reconciler.files))
                retry_at = await self._wait(retry_at)
                now = signature(self._reconciler.files)
                due = retry_at is not None and asyncio.get_running_loop().time() >= retry_at
                if now == seen and not due:
                    continue
                self._reconciler.prepare()
                seen = await self._settled(now)
                await self._reconciler.reconcile()
                delay = self._reconciler.retry_delay()
                retry_at = None if delay is None else asyncio.get_running_loop().time() + delay
        finally:
            await self._unfollow()

    async def _wait(self, retry_at: float | None) -> float | None:
        """Until a file event, the next look, or the moment to try again; passes `retry_at` through."""
        timeout = POLL
        if retry_at is not None:
            timeout = min(timeout, max(retry_at - asyncio.get_running_loop().time(), 0.0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), timeout)
        self._woken.clear()
        return retry_at

    async def _settled(self, before: Signature) -> Signature:
        """The signature, once it has not changed for QUIET seconds."""
        while True:
            await asyncio.sleep(QUIET)
            now = signature(self._reconciler.files)
            if now == before:
                return now
            before = now

    def _follow(self, folders: tuple[Path, ...]) -> None:
        # A folder that was replaced has the same path and another inode; events of the old one tell nothing.
        try:
            identities = tuple((folder, folder.stat().st_ino) for folder in folders)
        except OSError:
            return  # gone since they were listed: the next look lists them again
        if identities == self._watching and self._events is not None and not self._events.done():
            return
        self._stop_events.set()
        self._stop_events = asyncio.Event()
        self._watching = identities
        self._events = asyncio.create_task(self._listen(folders, self._stop_events))

    async def _listen(self, folders: tuple[Path, ...], stop: asyncio.Event) -> None:
        # Imported here: it costs 40 ms that the first answer on /health should not wait for.
        from watchfiles import awatch  # noqa: PLC0415

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs every event, and a pass says more
        try:
            async for _ in awatch(
                *folders, watch_filter=None, debounce=50, step=10, stop_event=stop, recursive=False, rust_timeout=5000
            ):
                self._woken.set()
        except OSError as error:  # a folder vanished, or the system is out of watches: the net still holds
            logger.warning("file events are off until the next change", extra={"error": str(error)})
            await asyncio.sleep(POLL)

    async def _unfollow(self) -> None:
        self._stop_events.set()
        if self._events is not None:
            await asyncio.wait([self._events], timeout=1.0)


def signature(paths: Iterable[Path]) -> Signature:
    """What tells one state of the files from another: identity, size and time of each, of a folder's entries too."""
    return tuple(_of_path(path) for path in paths)


def _of_path(path: Path) -> tuple[object, ...]:
    try:
        status = path.stat()
        if not path.is_dir():
            return (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        with os.scandir(path) as entries:
            inside = sorted((e.name, s.st_ino, s.st_size, s.st_mtime_ns) for e in entries for s in [_stat(e)])
    except OSError:
        return (str(path), None)
    return (str(path), status.st_ino, *inside)


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except FileNotFoundError:  # a dangling link
        return entry.stat(follow_symlinks=False)


def watched_folders(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The existing folders in which something happens when one of `paths` changes: each symlink hop's parent, and the
    path itself where it is a folder."""
    folders: dict[Path, None] = {}
    for path in paths:
        for hop in _hops(path):
            parent = _existing(hop.parent)
            folders[parent] = None
            if hop.is_dir():
                folders[hop] = None
    return tuple(folders)


def _hops(path: Path) -> list[Path]:
    """`path`, and every place its symlinks lead through. A loop of links ends after 40 hops, as in the kernel."""
    hops = [path]
    while hops[-1].is_symlink() and len(hops) < 40:
        hops.append(hops[-1].parent / hops[-1].readlink())
    return hops


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder
