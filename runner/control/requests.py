"""What the runner answers over the control socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from runner.control.attempt import Attempt
from runner.control.control_socket import Handler, error_json
from runner.control.events import Event, EventLog
from runner.control.ledger import Cause, Via
from runner.control.live import Live
from runner.control.reconciler import Pass, Reconciler
from runner.control.who import this_user
from runner.plan.render import plan_json
from runner.plan.scope import Scope

FEEDS: Final = frozenset({"events", "watch", "follow"})
"""Requests that are answered for as long as somebody listens."""


class Requests:
    """Answers by what `reconciler`, `live` and `events` know; `status` is what `mlx-run status --json` prints.

    `stop` ends the runner; it takes the seconds to drain for, None for the settings' own, and says how many there are.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        live: Live,
        events: EventLog,
        status: Callable[[], dict[str, Any]],
        stop: Callable[[float | None], float],
    ) -> None:
        self.settled = asyncio.Event()
        """To be set when the first pass has ended."""
        self._reconciler = reconciler
        self._live = live
        self._events = events
        self._status = status
        self._stop = stop
        self._attempts: dict[str, Attempt] = {}
        self._passes: set[asyncio.Task[Pass]] = set()

    @property
    def handlers(self) -> dict[str, Handler]:
        """By what a request's `op` says."""
        return {
            "status": self._answer_status,
            "plan": self._plan,
            "apply": self._apply,
            "give_up": self._give_up,
            "rollback": self._rollback,
            "follow": self._follow,
            "down": self._down,
            "events": self._history,
            "watch": self._watch,
        }

    async def _answer_status(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"done": True, **self._status()}

    async def _plan(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        made = await self._reconciler.preview(_manifests(request), _scope(request), frozen=bool(request.get("frozen")))
        yield {"done": True, "plan": plan_json(made), "generation": self._reconciler.generation}

    async def _apply(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        attempt, name = Attempt(request.get("timeout_seconds")), str(request.get("attempt", ""))
        self._attempts[name] = attempt
        work = self._reconciler.apply(
            _manifests(request),
            _cause("apply", request),
            watch=bool(request.get("watch", True)),
            scope=_scope(request),
            frozen=bool(request.get("frozen")),
            attempt=attempt,
        )
        try:
            async for reply in self._shown(work):
                yield reply
        finally:
            self._attempts.pop(name, None)

    async def _give_up(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Undo an apply that is under way; its own answer says whether it was too late."""
        attempt = self._attempts.get(str(request["attempt"]))
        if attempt is not None:
            attempt.give_up()
        yield {"done": True, "found": attempt is not None}

    async def _rollback(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        number, cause = request.get("to"), _cause("rollback", request)
        if request.get("dry_run"):
            intent = await self._reconciler.preview_rollback(number, cause)
            plan, current = plan_json(intent.plan), self._reconciler.generation
            yield {"done": True, "plan": plan, "generation": current, "restores": intent.restores}
            return
        async for reply in self._shown(self._reconciler.roll_back(number, cause)):
            if request.get("wait") and reply.get("done"):
                await self._live.settle()
            yield reply

    async def _shown(self, passing: Coroutine[Any, Any, Pass]) -> AsyncIterator[dict[str, Any]]:
        """A pass's events, and how it ended. It goes on when whoever asked for it hangs up."""
        with self._events.subscribe() as queue:
            work = self.carry_through(passing)
            async for event in _until(queue, work):
                yield event
        yield _outcome(work.result())

    def carry_through(self, passing: Coroutine[Any, Any, Pass]) -> asyncio.Task[Pass]:
        """Run a pass to its end, whoever waits for it; only `abandon` cancels it."""
        work = asyncio.create_task(passing)
        self._passes.add(work)
        work.add_done_callback(self._passes.discard)
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may have left
        return work

    async def abandon(self) -> None:
        """Cancel what is under way: the runner ends."""
        for asked in self._passes:
            asked.cancel()
        await asyncio.gather(*self._passes, return_exceptions=True)

    async def _follow(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What happened so far, and what happens until the first pass has ended."""
        with self._events.subscribe() as queue:
            for event in list(self._events.recent):
                yield event
            async for event in _until(queue, asyncio.create_task(self.settled.wait())):
                yield event
        assert self._reconciler.last is not None, "settled without a pass"
        yield _outcome(self._reconciler.last)

    async def _down(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        drain = request.get("drain")
        yield {"done": True, "pid": os.getpid(), "drain_seconds": self._stop(None if drain is None else float(drain))}

    async def _history(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for event in self._events.history(follow=bool(request.get("follow"))):
            yield event
        yield {"done": True}

    async def _watch(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The status now and after each change, until stopped or `within` seconds have passed."""
        async for _ in self._events.changes(beat=request.get("beat"), within=request.get("within")):
            yield self._status()
        yield {"done": True}


def _manifests(request: dict[str, Any]) -> tuple[Path, ...]:
    """The files that a request names, merged left to right."""
    return tuple(Path(path) for path in request["manifests"])


def _scope(request: dict[str, Any]) -> Scope:
    """What of the manifest a request is about."""
    return Scope(tuple(map(str, request.get("target") or ())), bool(request.get("prune", True)))


def _cause(via: Via, request: dict[str, Any]) -> Cause:
    """Who asks for a pass, and for which generation; the socket is the owner's, so they are believed."""
    generation = request.get("generation")
    return Cause(via, str(request.get("user") or this_user()), None if generation is None else int(generation))


def _outcome(result: Pass) -> dict[str, Any]:
    if result.error is not None:
        return {"error": error_json(result.error)}
    plan = plan_json(result.plan) if result.plan else None
    return {"done": True, "generation": result.generation, "seconds": round(result.seconds, 3), "plan": plan}


async def _until(queue: asyncio.Queue[Event], work: asyncio.Task[Any]) -> AsyncIterator[Event]:
    """Events until `work` is done, and those that were there by then."""
    while not work.done():
        getting = asyncio.create_task(queue.get())
        await asyncio.wait([getting, work], return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            yield getting.result()
        else:
            getting.cancel()
    while not queue.empty():
        yield queue.get_nowait()
