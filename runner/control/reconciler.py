"""The loop that makes the manifest true: load → check → resolve → plan → execute, whenever something may have changed.

A pass re-reads everything and is idempotent; what woke it carries no payload. Passes never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.control.backoff import Backoff
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.events import EventLog
from runner.control.executor import Executor, Live
from runner.errors import EngineDied, ListenerError, ManifestError, MlxRunError, RunnerError
from runner.machine import machine_memory
from runner.plan.actions import Plan
from runner.plan.planner import plan
from runner.plan.render import plan_json
from runner.plan.spec import Desired

logger = logging.getLogger(__name__)

Download = Callable[[str, str], Awaitable[None]]
"""Brings a repository at a revision into the hub cache. Raises EngineLoadError."""

_REST_AFTER = 10.0
"""Seconds after a pass until the compiler's process rests: edits come in bursts."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How one pass ended. `error` None means that observed equals desired."""

    plan: Plan | None
    generation: int
    error: MlxRunError | None
    seconds: float


class Reconciler:
    """Owns the passes over one manifest. `path` may change when an apply hands over another file of the same name."""

    def __init__(
        self, compiled: Compiled, live: Live, events: EventLog, compiler: Compiler, download: Download
    ) -> None:
        self.path = compiled.path
        self.last: Pass | None = None
        self.generation: int = (live.folder.read_generation() or {}).get("generation", 0)
        self.files = compiled.files or (compiled.path,)
        self._live = live
        self._events = events
        self._download = download
        self._compiler = compiler
        self._rest: asyncio.TimerHandle | None = None
        self._pending = False
        self._lock = asyncio.Lock()
        self._retry = Backoff(initial=1.0, maximum=60.0)
        self._name = live.folder.name
        self._memory_bytes = machine_memory()

    def prepare(self) -> None:
        """A pass is coming: have what it needs started."""
        self._pending = True
        asyncio.get_running_loop().run_in_executor(None, self._compiler.start)

    async def reconcile(self, compiled: Compiled | None = None) -> Pass:
        """One pass. `compiled` saves reading a manifest that was read a moment ago. Never raises MlxRunError."""
        async with self._lock:
            self._pending = False
            started = time.monotonic()
            made: Plan | None = None
            error: MlxRunError | None = None
            try:
                made = await self._pass(compiled)
            except MlxRunError as caught:
                error = caught
            except Exception as caught:
                # A fault of ours in one pass must not end what is being served.
                logger.exception("pass failed unexpectedly")
                error = RunnerError(f"unexpected {type(caught).__name__}: {caught}", hint="The runner's log has more.")
            if error is not None:
                self._events.emit("apply_failed", error=str(error))
            self.last = Pass(made, self.generation, error, time.monotonic() - started)
            self._let_rest()
            return self.last

    async def apply(self, path: Path) -> Pass:
        """A pass over `path`, which is the manifest from now on unless it cannot be used."""
        before = (self.path, self.files)
        self.path = path
        result = await self.reconcile()
        if result.error is not None and path != before[0]:
            self.path, self.files = before
        return result

    async def preview(self, path: Path) -> Plan:
        """The plan that `apply` would execute now. Raises MlxRunError."""
        desired = await self._desired(await self._compile(path))
        self._let_rest()
        return plan(desired, self._live.observe(self._memory_bytes))

    def retry_delay(self) -> float | None:
        """Seconds until the last pass deserves another try; None when only an edit can help, or nothing is wrong."""
        if self.last is not None and isinstance(self.last.error, EngineDied | ListenerError):
            return self._retry.failed(time.monotonic())
        return None

    async def _pass(self, compiled: Compiled | None) -> Plan:
        if compiled is None:
            compiled = await self._compile(self.path)
        if compiled.files:
            self.files = compiled.files
        desired = await self._desired(compiled)
        made = plan(desired, self._live.observe(self._memory_bytes))
        if made.empty:
            self._live.committed = desired
            self._events.emit("unchanged", generation=self.generation)
            return made
        self._events.emit("planned", plan=plan_json(made))
        await Executor(self._live, made, desired).execute()
        self._commit(made)
        return made

    async def _compile(self, path: Path) -> Compiled:
        return await asyncio.to_thread(self._compiler.compile, path, self._name)

    def _let_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        loop = asyncio.get_running_loop()
        self._rest = loop.call_later(_REST_AFTER, loop.run_in_executor, None, self._compiler.stop)

    async def _desired(self, compiled: Compiled) -> Desired:
        """The desired state, downloading what is missing. Raises ManifestError and EngineLoadError."""
        fetched: set[tuple[str, str]] = set()
        while compiled.missing is not None and compiled.missing not in fetched:
            fetched.add(compiled.missing)
            repo, revision = compiled.missing
            self._events.emit("downloading", repo=repo, revision=revision)
            await self._download(repo, revision)
            compiled = await self._compile(compiled.path)
        error = compiled.error()
        if error is not None:
            raise error
        assert compiled.desired is not None, "a manifest is either wrong or resolved"
        return compiled.desired

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
            # Not while an edit is being looked at: what was true of the last manifest says nothing of this one.
            "in_sync": self.last is not None and error is None and not self._pending and not self._lock.locked(),
            "manifest_error": str(error) if error else "",
            "problems": problems,
        }
