"""The loop that makes the manifest true: load → check → resolve → plan → execute, whenever something may have changed.

A pass re-reads everything and is idempotent; what woke it carries no payload. Passes never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.control.backoff import Backoff
from runner.control.events import EventLog
from runner.control.executor import Executor, Live
from runner.errors import EngineDied, ListenerError, ManifestError, MlxRunError, NotDownloaded
from runner.manifest.checks import is_path
from runner.manifest.load import Loaded, load_manifest
from runner.plan.actions import Plan
from runner.plan.digests import DigestCache
from runner.plan.planner import machine_memory, plan
from runner.plan.render import plan_json
from runner.plan.resolve import resolve
from runner.plan.spec import Desired

logger = logging.getLogger(__name__)

Download = Callable[[str, str], Awaitable[None]]
"""Brings a repository at a revision into the hub cache. Raises EngineLoadError."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How one pass ended. `error` None means that observed equals desired."""

    plan: Plan | None
    generation: int
    error: MlxRunError | None
    seconds: float


class Reconciler:
    """Owns the passes over one manifest. `path` may change when an apply hands over another file of the same name."""

    def __init__(self, path: Path, live: Live, events: EventLog, download: Download) -> None:
        self.path = path
        self.last: Pass | None = None
        self.generation: int = (live.folder.read_generation() or {}).get("generation", 0)
        self.files: tuple[Path, ...] = (path,)
        self.changed = asyncio.Event()
        self._live = live
        self._events = events
        self._download = download
        self._digests = DigestCache()
        self._lock = asyncio.Lock()
        self._retry = Backoff(initial=1.0, maximum=60.0)
        self._name = live.folder.name
        self._memory_bytes = machine_memory()

    async def reconcile(self, loaded: Loaded | None = None) -> Pass:
        """One pass. `loaded` saves reading a manifest that was read a moment ago. Never raises MlxRunError."""
        async with self._lock:
            started = time.monotonic()
            made: Plan | None = None
            error: MlxRunError | None = None
            try:
                made = await self._pass(loaded)
            except MlxRunError as caught:
                error = caught
                self._events.emit("apply_failed", error=str(caught))
            self.last = Pass(made, self.generation, error, time.monotonic() - started)
            return self.last

    async def apply(self, path: Path) -> Pass:
        """A pass over `path`, which is the manifest from now on unless it cannot be used."""
        before, self.path = self.path, path
        result = await self.reconcile()
        if result.error is not None and before != path:
            self.path = before
        self.changed.set()  # the watcher looks at the files of the new manifest
        return result

    async def preview(self, path: Path) -> Plan:
        """The plan that `apply` would execute now. Raises MlxRunError."""
        desired = await self._desired(load_manifest(path, os.environ))
        return plan(desired, self._live.observe(self._memory_bytes))

    def retry_delay(self) -> float | None:
        """Seconds until the last pass deserves another try; None when only an edit can help, or nothing is wrong."""
        if self.last is not None and isinstance(self.last.error, EngineDied | ListenerError):
            return self._retry.failed(time.monotonic())
        return None

    async def _pass(self, loaded: Loaded | None) -> Plan:
        if loaded is None:
            loaded = load_manifest(self.path, os.environ)
        self.files = (*loaded.files, *_local_sources(loaded))
        desired = await self._desired(loaded)
        made = plan(desired, self._live.observe(self._memory_bytes))
        if made.empty:
            self._live.committed = desired
            self._events.emit("unchanged", generation=self.generation)
            return made
        self._events.emit("planned", plan=plan_json(made))
        await Executor(self._live, made, desired).execute()
        self._commit(made)
        return made

    async def _desired(self, loaded: Loaded) -> Desired:
        if loaded.manifest.name != self._name:
            message = f"is {loaded.manifest.name!r}, but this runner was started as {self._name!r}"
            hint = f"keep the name, or `mlx-run down {self._name}` first"
            raise ManifestError([loaded.at(("name",), message, hint)])
        fetched: set[tuple[str, str]] = set()
        while True:
            try:
                return await self._resolve(loaded)
            except NotDownloaded as wanted:
                source = (wanted.repo, wanted.revision)
                if source in fetched:
                    raise  # it was downloaded, and still is not whole
                fetched.add(source)
                self._events.emit("downloading", repo=wanted.repo, revision=wanted.revision)
                await self._download(*source)

    async def _resolve(self, loaded: Loaded) -> Desired:
        # In a thread: hashing a new adapter's files takes a while, and lets the event loop run meanwhile.
        return await asyncio.to_thread(resolve, loaded, machine_memory=self._memory_bytes, cache=self._digests)

    def _commit(self, made: Plan) -> None:
        self.generation += 1
        self._retry = Backoff(initial=1.0, maximum=60.0)
        self._live.folder.write_generation(
            {
                "generation": self.generation,
                "manifest": str(self.path),
                "time": time.time(),
                "plan": plan_json(made),
            }
        )
        self._events.emit("applied", generation=self.generation, actions=len(made.actions))

    def status(self) -> dict[str, Any]:
        """The manifest's part of `mlx-run status`."""
        error = self.last.error if self.last else None
        problems: list[dict[str, Any]] = []
        if isinstance(error, ManifestError):
            problems = [
                {
                    "file": d.file,
                    "line": d.line,
                    "column": d.column,
                    "path": d.path,
                    "message": d.message,
                    "hint": d.hint,
                }
                for d in error.diagnostics
            ]
        return {
            "manifest": str(self.path),
            "generation": self.generation,
            "in_sync": self.last is not None and error is None,
            "manifest_error": str(error) if error else "",
            "problems": problems,
        }


def _local_sources(loaded: Loaded) -> tuple[Path, ...]:
    """Folders whose contents are part of the deployment, whether they are there (yet) or not."""
    models = loaded.manifest.models.values()
    sources = [s for m in models for s in (m.source, *(a.source for a in m.adapters.values())) if is_path(s)]
    return tuple(dict.fromkeys(loaded.path.parent / Path(source).expanduser() for source in sources))
