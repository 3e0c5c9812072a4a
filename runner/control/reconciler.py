"""The loop that makes the manifest true: load → check → resolve → plan → execute, whenever something may have changed.

A pass re-reads everything and is idempotent; what woke it carries no payload. Passes never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.control.adoption import adopt_engines
from runner.control.attempt import Attempt
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.drift import Drift, Edit, declared, require_as_seen, require_served
from runner.control.events import EventLog
from runner.control.fetching import Fetching
from runner.control.fulfilment import Fulfilment
from runner.control.ledger import Cause, Intent, Ledger
from runner.control.live import Live
from runner.control.portion import Portion
from runner.control.reading import Reading
from runner.control.restoring import Restoring
from runner.control.who import this_user
from runner.errors import (
    Diagnostic,
    DownloadFailed,
    EngineDied,
    ListenerError,
    ManifestError,
    MlxRunError,
    RunnerError,
    SourceChanged,
)
from runner.machine import machine_memory
from runner.plan.actions import Against, Bounds, Plan
from runner.plan.planner import Observed, plan
from runner.plan.scope import WHOLE, Scope
from runner.plan.spec import Desired

logger = logging.getLogger(__name__)

_TRIES = 3
"""How often a pass plans again because files changed under it."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How one pass ended. `error` None means that observed equals desired."""

    plan: Plan | None
    generation: int
    error: MlxRunError | None
    seconds: float


class Reconciler:
    """Owns the passes over one manifest. `paths` may change when an apply hands over other files of the same name."""

    def __init__(
        self, compiled: Compiled, live: Live, events: EventLog, compiler: Compiler, fetching: Fetching | None = None
    ) -> None:
        self.paths = compiled.paths
        self.last: Pass | None = None
        self.inputs = compiled.inputs
        self.watching = True
        self.frozen = False
        self.warnings: tuple[Diagnostic, ...] = ()
        self._live = live
        self._ledger = Ledger(live.folder)
        self._seen = ""
        self._planned: Plan | None = None
        self._adopted = False
        self._portion = Portion()
        self._drift = Drift()
        self._events = events
        fetch = fetching or Fetching(events, live.wanted, live.folder.log)
        self._reading = Reading(compiler, live.folder.name, fetch, live.wanted)
        self._restoring = Restoring(live, self._ledger, events)
        self._fulfilment = Fulfilment(live, self._ledger, events)
        self._pending = False
        self._lock = asyncio.Lock()
        self._memory_bytes = machine_memory()

    def prepare(self) -> None:
        """A pass is coming: have what it needs started."""
        self._pending = True
        self._reading.prepare()

    @property
    def generation(self) -> int:
        """The number of the generation that is live, 0 before the first."""
        return self._ledger.number

    @property
    def drift(self) -> tuple[str, ...]:
        """What the admin API changed since the manifest was applied, in a few words each."""
        return self._drift.lines

    @property
    def resting(self) -> tuple[str, ...]:
        """Models of the manifest that the admin API unloaded."""
        return self._drift.changes.unloaded

    async def reconcile(
        self, compiled: Compiled | None = None, cause: Cause | None = None, attempt: Attempt | None = None
    ) -> Pass:
        """One pass. `compiled` saves reading a manifest that was read a moment ago; without a cause it is the watch's.

        Raises StaleGeneration, and no other MlxRunError.
        """
        async with self._lock:
            return await self._reconcile(compiled, cause or Cause("watch", this_user()), attempt)

    async def start(self, compiled: Compiled, cause: Cause, scope: Scope, attempt: Attempt) -> Pass:
        """The first pass, over what was compiled already. Raises Interrupted and RunnerError where it is given up."""
        self._portion = Portion(scope)
        return await attempt.run(self.reconcile(compiled, cause, attempt))

    async def apply(
        self,
        paths: tuple[Path, ...],
        cause: Cause,
        *,
        watch: bool = True,
        scope: Scope = WHOLE,
        frozen: bool = False,
        attempt: Attempt | None = None,
    ) -> Pass:
        """A pass over `paths`, which are the manifest from now on unless they cannot be used; followed if `watch`, and
        held to their lock if `frozen`.

        Only what is within `scope` is touched, now and by later edits, until an apply without one. Raises
        StaleGeneration, and Interrupted or RunnerError where it is given up before it has begun.
        """
        attempt = attempt or Attempt()
        return await attempt.run(self._apply(paths, cause, Portion(scope), attempt, watch=watch, frozen=frozen))

    async def _apply(
        self,
        paths: tuple[Path, ...],
        cause: Cause,
        portion: Portion,
        attempt: Attempt,
        *,
        watch: bool,
        frozen: bool,
    ) -> Pass:
        async with self._lock:
            self._ledger.require(cause.generation)
            before = (self.paths, self.inputs, self._seen)
            held, self._portion = self._portion, portion
            was_frozen, self.frozen = self.frozen, frozen
            self.paths = paths
            result = await self._reconcile(None, cause, attempt)
            if result.error is None:
                self.watching = watch
            else:
                self._portion, self.frozen = held, was_frozen
                if paths != before[0]:
                    self.paths, self.inputs, self._seen = before
            return result

    async def change(self, edit: Edit, cause: Cause) -> Pass:
        """Make live what `edit` makes of the changes that there are, and of the manifest as it was applied.

        It holds until the manifest is edited or applied. Raises MlxRunError; then nothing changed.
        """
        async with self._lock:
            started = time.monotonic()
            intent, drift = await self._intent_to_change(edit, cause)
            self._events.emit("changing", changes=list(drift.lines), user=cause.user)
            try:
                await self._fulfilment.make_so(intent)
            except MlxRunError as error:
                self._events.emit("change_failed", error=str(error))
                raise
            finally:
                self._reading.let_rest()
            self._drift = drift
            self.last = Pass(intent.plan, self.generation, None, time.monotonic() - started)
            return self.last

    async def preview(self, paths: tuple[Path, ...], scope: Scope = WHOLE, *, frozen: bool = False) -> Plan:
        """The plan that `apply` would execute now; provisional where it would download first. Raises MlxRunError."""
        compiled = await self._reading.compile(paths, frozen=frozen)
        self._reading.let_rest()
        desired = compiled.desired or compiled.provisional
        if desired is None:
            error = compiled.error()
            assert error is not None, "a manifest is either wrong or resolved"
            raise error
        observed = self._observe()
        return plan(Portion(scope).of(desired, observed, strict=True), observed)

    async def roll_back(self, number: int | None, cause: Cause) -> Pass:
        """Make an earlier generation live again, as a new one; without a number the one before the current.

        The manifest stays as it is, and does not undo this until it is edited. Raises MlxRunError; then nothing
        changed.
        """
        async with self._lock:
            started = time.monotonic()
            intent = await self._intent_to_restore(number, cause)
            self._events.emit("rolling_back", restores=intent.restores, user=cause.user)
            try:
                await self._fulfilment.make_so(intent)
            except MlxRunError as error:
                self._events.emit("rollback_failed", restores=intent.restores, error=str(error))
                raise
            self._portion, self._drift = Portion(), Drift()
            self.last = Pass(intent.plan, self.generation, None, time.monotonic() - started)
            return self.last

    async def preview_rollback(self, number: int | None, cause: Cause) -> Intent:
        """What `roll_back` would do now. Raises MlxRunError."""
        return await self._intent_to_restore(number, cause)

    def retry_delay(self) -> float | None:
        """Seconds until the last pass deserves another try; None when only an edit can help, or nothing is wrong."""
        error = self.last.error if self.last is not None else None
        passing = isinstance(error, DownloadFailed) and error.passing
        if passing or isinstance(error, EngineDied | ListenerError | SourceChanged):
            return self._fulfilment.retry.failed(time.monotonic())
        return None

    async def _reconcile(self, compiled: Compiled | None, cause: Cause, attempt: Attempt | None) -> Pass:
        self._ledger.require(cause.generation)
        self._pending = False
        started = time.monotonic()
        made: Plan | None = None
        error: MlxRunError | None = None
        try:
            made = await self._pass_again(compiled, cause)
        except MlxRunError as caught:
            error = caught
        except asyncio.CancelledError:
            if attempt is None or attempt.given_up is None:
                raise  # the runner stops
            error = attempt.given_up
        except OSError as caught:
            logger.exception("pass failed")
            place = caught.filename or f"the state folder {self._live.folder.folder}"
            error = RunnerError(f"{place}: {caught.strerror or caught}", hint="Make room, or mend the folder.")
        except Exception as caught:
            # A fault of ours in one pass must not end what is being served.
            logger.exception("pass failed unexpectedly")
            error = RunnerError(f"unexpected {type(caught).__name__}: {caught}", hint="The runner's log has more.")
        if error is not None:
            self._fulfilment.tell_models(error, self._planned)
            self._events.emit("apply_failed", error=str(error))
        self.last = Pass(made, self.generation, error, time.monotonic() - started)
        self._reading.let_rest()
        return self.last

    async def _pass_again(self, compiled: Compiled | None, cause: Cause) -> Plan:
        """A pass, and another where files changed while they were loaded: the plan was of what they were before."""
        for _ in range(_TRIES - 1):
            try:
                return await self._pass(compiled, cause)
            except SourceChanged as error:
                self._events.emit("source_changed", error=error.message)
                compiled = None
        return await self._pass(compiled, cause)

    async def _pass(self, compiled: Compiled | None, cause: Cause) -> Plan:
        if compiled is None:
            compiled = await self._reading.compile(self.paths, frozen=self.frozen)
        self._planned = None
        self._live.wanted.keep((*compiled.models, *self._live.deployments))
        self.inputs = compiled.inputs
        self._warn(compiled.warnings)
        self._seen = await asyncio.to_thread(self._ledger.seen, compiled)
        restores, drift = 0, Drift()
        if cause.via != "apply" and self._ledger.holds(self._seen):
            desired, restores = await self._restoring.held(compiled, self.paths[0])
        elif cause.via != "apply" and self._drift.holds(self._seen) and self._live.committed is not None:
            desired, drift = self._live.committed, self._drift
        else:
            desired = await self._desired(compiled)
        await self._adopt(desired)
        whole, strict = desired, cause.via in ("start", "apply")
        if not restores:
            desired = self._portion.of(whole, self._observe(), strict=strict)
        self._live.wanted.can_be_had(m.name for m in desired.models)
        made = self._planned = plan(desired, self._observe())
        await self._fulfilment.make_so(Intent(desired, made, cause, tuple(map(str, self.paths)), self._seen, restores))
        self._drift = drift
        self._portion.settle(whole, self._observe())
        if self._portion.left_out:
            self._events.emit("left_out", scope=str(self._portion.scope), actions=list(self._portion.left_out))
        return made

    async def _adopt(self, desired: Desired) -> None:
        """Take over what an earlier runner left, once: before anything is downloaded, for it does not wait for long."""
        if not self._adopted:
            self._adopted = True
            await adopt_engines(self._live, desired)

    def _warn(self, warnings: tuple[Diagnostic, ...]) -> None:
        new = [str(warning) for warning in warnings if warning not in self.warnings]
        self.warnings = warnings
        if new:
            self._events.emit("warned", warnings=new)

    async def _intent_to_restore(self, number: int | None, cause: Cause) -> Intent:
        self._ledger.require(cause.generation)
        desired, restores = await self._restoring.target(number)
        made = plan(desired, self._observe())
        return Intent(desired, made, cause, tuple(map(str, self.paths)), self._seen, restores)

    async def _intent_to_change(self, edit: Edit, cause: Cause) -> tuple[Intent, Drift]:
        self._ledger.require(cause.generation)
        compiled = await self._reading.compile(self.paths, frozen=self.frozen)
        seen = await asyncio.to_thread(self._ledger.seen, compiled)
        error = self.last.error if self.last else None
        obstacle = str(error) if error else self._ledger.drift(self._seen) or self._portion.drift()
        require_as_seen(seen, self._seen, obstacle)
        changes = edit(self._drift.changes, declared(compiled))
        if changes:
            compiled = await self._reading.compile(self.paths, changes, frozen=self.frozen)
        try:
            desired = await self._desired(compiled)
        finally:
            self._live.wanted.keep(self._live.deployments)
        require_served(desired, changes)
        made = plan(desired, replace(self._observe(), drift=(), removed="unloaded by the admin API"))
        return Intent(desired, made, cause, tuple(map(str, self.paths)), seen), Drift(changes, seen)

    def _observe(self) -> Observed:
        options = self._live.options
        return replace(
            self._live.observe(self._memory_bytes),
            bounds=Bounds(options.drain_timeout, options.load_wait),
            against=Against("runner", self.generation),
            drift=self._drift.lines,
        )

    async def _desired(self, compiled: Compiled) -> Desired:
        """The desired state, downloading what is missing. Raises ManifestError."""
        if compiled.provisional is not None:
            await self._adopt(compiled.provisional)
        return await self._reading.desired(compiled, self._portion, self._observe, frozen=self.frozen)

    def status(self) -> dict[str, Any]:
        """The manifest's part of `mlx-run status`."""
        error = self.last.error if self.last else None
        drift = self._ledger.drift(self._seen) or self._portion.drift() or self._drift.text()
        settled = self.last is not None and error is None and not self._pending and not self._lock.locked()
        return {
            "manifest": str(self.paths[0]),
            "manifests": [str(path) for path in self.paths],
            "watching": self.watching,
            "frozen": self.frozen,
            **self._ledger.status(),
            # Not while an edit is being looked at: what was true of the last manifest says nothing of this one.
            "settled": settled,
            "in_sync": settled and not drift,
            "drift": drift,
            "left_out": list(self._portion.left_out),
            "changes": self._drift.as_json(),
            "manifest_error": str(error) if error else "",
            "problems": _told(error.diagnostics if isinstance(error, ManifestError) else ()),
            "warnings": _told(self.warnings),
        }


def _told(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    kept = ("file", "line", "column", "path", "message", "hint", "code")
    return [{key: getattr(found, key) for key in kept} for found in diagnostics]
