"""Notices that a file which matters has changed, however it was changed.

File events wake it early; a look at every file once a second is the net below, because events go missing when an
editor renames, a symlink is swapped or a folder is replaced. Either way only the files' state counts, never an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any, Protocol

from runner.control.followed import Followed
from runner.manifest.inputs import Inputs

logger = logging.getLogger(__name__)

QUIET = 0.1
"""Seconds a file must stay as it is before it is read: editors and copies write in pieces."""

BURST_QUIET = 0.25
"""As QUIET, of files that changed again meanwhile: who saves ten times in a second wants the last of them."""

POLL = 1.0
"""Seconds between looks without an event."""


class Subject(Protocol):
    """What is kept in step with its files; `runner.control.reconciler.Reconciler` is."""

    followed: Followed
    """What was last read: a pass notes its inputs, and what changes behind its back is seen in the next look. Where it
    is not watching, edits do not count; tries that are due are made all the same."""

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
    """Runs a pass of its subject after every change of the subject's inputs."""

    def __init__(self, reconciler: Subject) -> None:
        self._reconciler = reconciler
        self._woken = asyncio.Event()
        self._stop_events = asyncio.Event()
        self._events: asyncio.Task[None] | None = None
        self._watching: tuple[tuple[Path, int], ...] = ()

    async def run(self) -> None:
        """Watch until cancelled. A fault of ours is logged, and what there is goes on being served and watched."""
        try:
            while True:
                try:
                    await self._run()
                except Exception:
                    logger.exception("watching failed unexpectedly, and begins again")
                    await asyncio.sleep(POLL)
        finally:
            await self._unfollow()

    async def _run(self) -> None:
        followed = self._reconciler.followed
        retry_at: float | None = None
        while True:
            self._follow(self._folders())
            retry_at = await self._wait(retry_at)
            due = retry_at is not None and asyncio.get_running_loop().time() >= retry_at
            if not (followed.watching or due):
                continue
            now = followed.inputs.now()
            if now == followed.inputs and not due:
                continue
            self._reconciler.prepare()
            # What a pass that fails early does not come to read is not looked at again until it changes again.
            followed.inputs = await self._settled(now)
            await self._reconciler.reconcile()
            delay = self._reconciler.retry_delay()
            retry_at = None if delay is None else asyncio.get_running_loop().time() + delay

    def _folders(self) -> tuple[Path, ...]:
        """Where something happens when an input changes; none is no reason not to look every second."""
        followed = self._reconciler.followed
        try:
            found = followed.inputs.folders_to_watch() if followed.watching else ()
        except Exception:
            logger.exception("it is not known which folders to watch")
            return ()
        return tuple(folder for folder in found if _is_text(folder))  # watchfiles takes no others

    async def _wait(self, retry_at: float | None) -> float | None:
        """Until a file event, the next look, or the moment to try again; passes `retry_at` through."""
        timeout = POLL
        if retry_at is not None:
            timeout = min(timeout, max(retry_at - asyncio.get_running_loop().time(), 0.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):  # wait_for would lose a cancellation that comes with an event
                await self._woken.wait()
        self._woken.clear()
        return retry_at

    async def _settled(self, before: Inputs) -> Inputs:
        """The state of everything, once nothing has changed for QUIET seconds.

        An edit does not wait for a folder into which something large is being copied.
        """
        read = self._reconciler.followed.inputs
        quiet = QUIET
        while True:
            await asyncio.sleep(quiet)
            now = before.now()
            if now == before or (now.files == before.files and now.files != read.files):
                return now
            before, quiet = now, BURST_QUIET

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
        self._events = asyncio.create_task(self._listen(folders, self._stop_events)) if folders else None

    async def _listen(self, folders: tuple[Path, ...], stop: asyncio.Event) -> None:
        # Imported here: it costs 40 ms that the first answer on /health should not wait for.
        from watchfiles import awatch  # noqa: PLC0415

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs every event, and a pass says more
        # What changed before events were on is seen in a look. It comes when this task waits first, and then they are.
        self._woken.set()
        try:
            async for _ in awatch(
                *folders, watch_filter=None, debounce=50, step=10, stop_event=stop, recursive=False, rust_timeout=5000
            ):
                self._woken.set()
        except (OSError, RuntimeError, ValueError, ExceptionGroup) as error:
            # A folder vanished, no watches are left, a name in it is no text: the net still holds.
            logger.warning("file events are off until the next change", extra={"error": str(error)})
            await asyncio.sleep(POLL)

    async def _unfollow(self) -> None:
        self._stop_events.set()
        if self._events is not None:
            await asyncio.wait([self._events], timeout=1.0)


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
