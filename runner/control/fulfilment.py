"""Makes true what a pass, a change or a rollback intends, and keeps it as a generation."""

from __future__ import annotations

import asyncio
import time

from runner.control.backoff import Backoff
from runner.control.conditions import concerns
from runner.control.events import EventLog
from runner.control.executor import Executor
from runner.control.ledger import Intent, Ledger
from runner.control.live import Live
from runner.errors import ManifestError, MlxRunError, SourceChanged
from runner.plan.actions import Plan
from runner.plan.render import plan_json


class Fulfilment:
    """`retry` says when what failed in passing deserves another try; it begins anew with each plan that succeeds."""

    def __init__(self, live: Live, ledger: Ledger, events: EventLog) -> None:
        self.retry = Backoff(initial=1.0, maximum=60.0)
        self._live = live
        self._ledger = ledger
        self._events = events

    async def make_so(self, intent: Intent) -> None:
        """Execute the plan and keep it as a generation. Raises MlxRunError; then everything is as it was."""
        started = time.monotonic()
        held = intent.restores and intent.cause.via != "rollback"

        async def record() -> None:
            if not held:
                await asyncio.to_thread(self._ledger.keep, intent, time.monotonic() - started)

        if intent.plan.empty:
            await record()
            self._live.committed = intent.desired
            self._live.room.limit = intent.desired.memory_limit_bytes
            self._live.room.share()
            self.tell_models(None)
            self._events.emit("unchanged", generation=self._ledger.number)
            return
        self._events.emit("planned", plan=plan_json(intent.plan))
        try:
            await Executor(self._live, intent.plan, intent.desired).execute(record)
        except SourceChanged:
            raise
        except (Exception, asyncio.CancelledError) as error:
            why = str(error) or "given up before it was live"
            await asyncio.to_thread(self._ledger.keep_failed, intent, time.monotonic() - started, why)
            raise
        self.retry = Backoff(initial=1.0, maximum=60.0)
        self._live.room.share()
        self.tell_models(None)
        self._events.emit(
            "applied",
            generation=self._ledger.number,
            actions=len(intent.plan.actions),
            via=intent.cause.via,
            user=intent.cause.user,
            restores=intent.restores,
        )

    def tell_models(self, error: MlxRunError | None, planned: Plan | None = None) -> None:
        """Let each deployment know whether what is wanted of it is in effect. Told before the pass's own verdict is."""
        targets = {action.target for action in planned.actions} if planned else set()
        found = error.diagnostics if isinstance(error, ManifestError) else []
        names = {*self._live.deployments, *self._live.wanted.names}
        for name, deployment in self._live.deployments.items():
            about = [d.message for d in found if concerns(d, name, names)]
            if error is not None and f"models.{name}" in targets:
                about.append(error.message)
            deployment.health.behind("; ".join(about))
        if error is None:
            self._live.wanted.keep(self._live.deployments)
            self._live.wanted.can_be_had(self._live.deployments)
