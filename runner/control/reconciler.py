"""The loop that makes the manifest true: load → check → resolve → plan → execute, whenever something may have changed.

A pass re-reads everything and is idempotent; what woke it carries no payload. Passes never overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.control.attempt import Attempt
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.drift import Drift, Edit
from runner.control.events import EventLog
from runner.control.fetching import Fetching
from runner.control.followed import Followed, told
from runner.control.fulfilment import Fulfilment
from runner.control.intents import Intents
from runner.control.ledger import Cause, Intent, Ledger
from runner.control.live import Live
from runner.control.portion import Portion
from runner.control.reading import Reading
from runner.control.restoring import Restoring
from runner.control.who import this_user
from runner.errors import (
    DownloadFailed,
    EngineDied,
    ListenerError,
    ManifestError,
    MlxRunError,
    RunnerError,
    SourceChanged,
)
from runner.plan.actions import Plan
from runner.plan.scope import WHOLE, Scope

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
    """Owns the passes over the manifest that is `followed`: other files, once an apply hands over some of its name."""

    def __init__(
        self, compiled: Compiled, live: Live, events: EventLog, compiler: Compiler, fetching: Fetching | None = None
    ) -> None:
        self.followed = Followed(compiled.paths, compiled.inputs, compiled.hub_token)
        self.last: Pass | None = None
        self._live = live
        self._ledger = Ledger(live.folder)
        self._planned: Plan | None = None
        self._events = events
        fetch = fetching or Fetching(events, live.wanted, live.folder.log)
        self._reading = Reading(compiler, live.folder.name, fetch, live.wanted)
        restoring = Restoring(live, self._ledger, events)
        self._intents = Intents(self.followed, live, self._ledger, self._reading, restoring, events)
        self._fulfilment = Fulfilment(live, self._ledger, events)
        self._pending = False
        self._lock = asyncio.Lock()

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
        return self.followed.drift.lines

    @property
    def resting(self) -> tuple[str, ...]:
        """Models of the manifest that the admin API unloaded."""
        return self.followed.drift.changes.unloaded

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
        self.followed.portion = Portion(scope)
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
            followed, before = self.followed, replace(self.followed)
            followed.paths, followed.portion, followed.frozen = paths, portion, frozen
            result = await self._reconcile(None, cause, attempt)
            if result.error is None:
                followed.watching = watch
            else:
                followed.portion, followed.frozen = before.portion, before.frozen
                if paths != before.paths:
                    followed.paths, followed.inputs, followed.seen = before.paths, before.inputs, before.seen
            return result

    async def change(self, edit: Edit, cause: Cause) -> Pass:
        """Make live what `edit` makes of the changes that there are, and of the manifest as it was applied.

        It holds until the manifest is edited or applied. Raises MlxRunError; then nothing changed.
        """
        async with self._lock:
            started = time.monotonic()
            intent, drift = await self._intents.to_change(edit, cause, str(self.last.error or "") if self.last else "")
            self._events.emit("changing", changes=list(drift.lines), user=cause.user)
            try:
                await self._fulfilment.make_so(intent)
            except MlxRunError as error:
                self._events.emit("change_failed", error=str(error))
                raise
            finally:
                self._reading.let_rest()
            self.followed.drift = drift
            self.last = Pass(intent.plan, self.generation, None, time.monotonic() - started)
            return self.last

    async def preview(self, paths: tuple[Path, ...], scope: Scope = WHOLE, *, frozen: bool = False) -> Plan:
        """The plan that `apply` would execute now; provisional where it would download first. Raises MlxRunError."""
        return await self._intents.preview(paths, Portion(scope), frozen=frozen)

    async def roll_back(self, number: int | None, cause: Cause) -> Pass:
        """Make an earlier generation live again, as a new one; without a number the one before the current.

        The manifest stays as it is, and does not undo this until it is edited. Raises MlxRunError; then nothing
        changed.
        """
        async with self._lock:
            started = time.monotonic()
            intent = await self._intents.to_restore(number, cause)
            self._events.emit("rolling_back", restores=intent.restores, user=cause.user)
            try:
                await self._fulfilment.make_so(intent)
            except MlxRunError as error:
                self._events.emit("rollback_failed", restores=intent.restores, error=str(error))
                raise
            self.followed.portion, self.followed.drift = Portion(), Drift()
            self.last = Pass(intent.plan, self.generation, None, time.monotonic() - started)
            return self.last

    async def preview_rollback(self, number: int | None, cause: Cause) -> Intent:
        """What `roll_back` would do now. Raises MlxRunError."""
        return await self._intents.to_restore(number, cause)

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
        self._planned = None
        aim = await self._intents.of_manifest(compiled, cause)
        self._planned = aim.intent.plan
        await self._fulfilment.make_so(aim.intent)
        self._intents.settle(aim)
        return aim.intent.plan

    def status(self) -> dict[str, Any]:
        """The manifest's part of `mlx-run status`."""
        error = self.last.error if self.last else None
        followed = self.followed.status(self._ledger)
        # Not while an edit is being looked at: what was true of the last manifest says nothing of this one.
        settled = self.last is not None and error is None and not self._pending and not self._lock.locked()
        return {
            **followed,
            **self._ledger.status(),
            "settled": settled,
            "in_sync": settled and not followed["drift"],
            "manifest_error": str(error) if error else "",
            "problems": told(error.diagnostics if isinstance(error, ManifestError) else ()),
        }
