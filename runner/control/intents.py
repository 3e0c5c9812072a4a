"""What is to be made so, and by which plan: for the manifest, an earlier generation, or a change of the admin API."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from runner.control.adoption import adopt_engines
from runner.control.compiled import Compiled
from runner.control.drift import Drift, Edit, declared, require_as_seen, require_served
from runner.control.events import EventLog
from runner.control.followed import Followed
from runner.control.ledger import Cause, Intent, Ledger
from runner.control.live import Live
from runner.control.portion import Portion
from runner.control.reading import Reading
from runner.control.restoring import Restoring
from runner.errors import Diagnostic
from runner.machine import machine_memory
from runner.plan.actions import Against, Bounds, Plan
from runner.plan.planner import Observed, plan
from runner.plan.spec import Desired


@dataclass(frozen=True, slots=True)
class Aim:
    """What a pass is for. `whole` is what the manifest comes to, `drift` the changes that are kept over it."""

    intent: Intent
    whole: Desired
    drift: Drift


class Intents:
    """Reads what is `followed` and looks at what is live; executes nothing, but for the adoption of engines."""

    def __init__(
        self,
        followed: Followed,
        live: Live,
        ledger: Ledger,
        reading: Reading,
        restoring: Restoring,
        events: EventLog,
    ) -> None:
        self._followed = followed
        self._live = live
        self._ledger = ledger
        self._reading = reading
        self._restoring = restoring
        self._events = events
        self._adopted = False
        self._memory_bytes = machine_memory()

    async def preview(self, paths: tuple[Path, ...], portion: Portion, *, frozen: bool) -> Plan:
        """The plan for `portion` of the manifest in `paths`. Raises MlxRunError."""
        compiled = await self._reading.compile(paths, frozen=frozen)
        self._reading.let_rest()
        desired = compiled.desired or compiled.provisional
        if desired is None:
            error = compiled.error()
            assert error is not None, "a manifest is either wrong or resolved"
            raise error
        observed = self.observe()
        return plan(portion.of(desired, observed, strict=True), observed)

    async def of_manifest(self, compiled: Compiled | None, cause: Cause) -> Aim:
        """What a pass over the manifest is for: itself, or what holds while it is as it was seen. `compiled` saves
        reading it. Raises MlxRunError."""
        followed, live = self._followed, self._live
        if compiled is None:
            compiled = await self._reading.compile(followed.paths, frozen=followed.frozen)
        live.wanted.keep((*compiled.models, *live.deployments))
        followed.inputs, followed.hub_token = compiled.inputs, compiled.hub_token
        followed.missing = compiled.provisional.downloads if compiled.provisional is not None else ()
        self._warn(compiled.warnings)
        followed.seen = await asyncio.to_thread(self._ledger.seen, compiled)
        restores, drift, asked = 0, Drift(), cause.via == "apply"
        if not asked and self._ledger.holds(followed.seen):
            whole, restores = await self._restoring.held(compiled, followed.paths[0])
        elif not asked and followed.drift.holds(followed.seen) and live.committed is not None:
            whole, drift = live.committed, followed.drift
        else:
            whole = await self._desired(compiled)
        await self._adopt(whole)
        desired = whole
        if not restores:
            desired = followed.portion.of(whole, self.observe(), strict=cause.via in ("start", "apply"))
        live.wanted.can_be_had(m.name for m in desired.models)
        made = plan(desired, self.observe())
        return Aim(followed.intent(desired, made, cause, restores), whole, drift)

    def settle(self, aim: Aim) -> None:
        """It is live: see what is left out of the whole, and which changes are kept."""
        portion = self._followed.portion
        self._followed.drift = aim.drift
        portion.settle(aim.whole, self.observe())
        if portion.left_out:
            self._events.emit("left_out", scope=str(portion.scope), actions=list(portion.left_out))

    async def to_restore(self, number: int | None, cause: Cause) -> Intent:
        """Generation `number` again, or the one before the current. Raises MlxRunError."""
        self._ledger.require(cause.generation)
        desired, restores = await self._restoring.target(number)
        made = plan(desired, self.observe())
        return self._followed.intent(desired, made, cause, restores)

    async def to_change(self, edit: Edit, cause: Cause, wrong: str) -> tuple[Intent, Drift]:
        """What `edit` makes of the manifest as it was applied; `wrong` is why its last pass failed, empty where it did
        not. Raises MlxRunError."""
        followed = self._followed
        self._ledger.require(cause.generation)
        compiled = await self._reading.compile(followed.paths, frozen=followed.frozen)
        seen = await asyncio.to_thread(self._ledger.seen, compiled)
        require_as_seen(seen, followed.seen, wrong or followed.obstacle(self._ledger))
        changes = edit(followed.drift.changes, declared(compiled))
        if changes:
            compiled = await self._reading.compile(followed.paths, changes, frozen=followed.frozen)
        try:
            desired = await self._desired(compiled)
        finally:
            self._live.wanted.keep(self._live.deployments)
        require_served(desired, changes)
        made = plan(desired, replace(self.observe(), drift=(), removed="unloaded by the admin API"))
        return followed.intent(desired, made, cause), Drift(changes, seen)

    async def _desired(self, compiled: Compiled) -> Desired:
        """The desired state, downloading what is missing. Raises ManifestError."""
        if compiled.provisional is not None:
            await self._adopt(compiled.provisional)
        return await self._reading.desired(compiled, self._followed.portion, self.observe, frozen=self._followed.frozen)

    async def _adopt(self, desired: Desired) -> None:
        """Take over what an earlier runner left, once: before anything is downloaded, for it does not wait for long."""
        if not self._adopted:
            self._adopted = True
            await adopt_engines(self._live, desired)

    def _warn(self, warnings: tuple[Diagnostic, ...]) -> None:
        new = [str(warning) for warning in warnings if warning not in self._followed.warnings]
        self._followed.warnings = warnings
        if new:
            self._events.emit("warned", warnings=new)

    def observe(self) -> Observed:
        """What is live now."""
        options = self._live.options
        return replace(
            self._live.observe(self._memory_bytes),
            bounds=Bounds(options.drain_timeout, options.load_wait),
            against=Against("runner", self._ledger.number),
            drift=self._followed.drift.lines,
        )
