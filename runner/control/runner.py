"""The runner process: control and gateway in one event loop, without MLX."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.control.admin import Admin
from runner.control.attempt import Attempt
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.control_socket import ControlSocket, error_json
from runner.control.events import Event, EventLog
from runner.control.ledger import Cause, Via
from runner.control.live import Live
from runner.control.reconciler import Pass, Reconciler
from runner.control.state_folder import StateFolder
from runner.control.watcher import Watcher
from runner.control.who import this_user
from runner.errors import Interrupted, MlxRunError
from runner.options import Options
from runner.plan.render import plan_json
from runner.plan.scope import WHOLE, Scope

logger = logging.getLogger(__name__)

_FILES = 8192


class Runner:
    """One runner: everything a name owns while it is up. `on_event` sees each event as it happens; without `watch`,
    edits are taken by `apply` only."""

    def __init__(
        self,
        compiled: Compiled,
        options: Options,
        compiler: Compiler,
        on_event: Callable[[Event], None] | None = None,
        *,
        watch: bool = True,
        scope: Scope = WHOLE,
        timeout: float | None = None,
        frozen: bool = False,
    ) -> None:
        self._compiled = compiled
        self._folder = StateFolder(options.state_dir, compiled.name)
        self._events = EventLog(on_event)
        self._live = Live(self._folder, options, self._events.emit)
        self._compiler = compiler
        self._reconciler = Reconciler(compiled, self._live, self._events, compiler)
        self._reconciler.watching = watch
        self._reconciler.frozen = frozen
        servers, state = (lambda: list(self._live.listeners)), options.state_dir
        self._live.admin = Admin(self._reconciler, self.status, servers, self._pass, state)
        self._scope = scope
        self._first = Attempt(timeout)
        self._given_up: Interrupted | None = None
        self._attempts: dict[str, Attempt] = {}
        self._control = ControlSocket(
            self._folder.control_socket,
            {
                "status": self._status,
                "plan": self._plan,
                "apply": self._apply,
                "give_up": self._give_up,
                "rollback": self._rollback,
                "follow": self._follow,
                "down": self._down,
                "events": self._history,
                "watch": self._watch,
            },
            feeds=frozenset({"events", "watch", "follow"}),
        )
        self._started_at = time.time()
        self._passes: set[asyncio.Task[Pass]] = set()
        self._settled = asyncio.Event()
        self._stop = asyncio.Event()
        self._drain_timeout = options.drain_timeout

    async def run(self) -> Pass:
        """Serve until told to stop. Returns the first pass when that failed, else the last one.

        Raises AlreadyRunning.
        """
        lock = self._folder.lock()
        _allow_many_files()
        self._catch_signals()
        try:
            await self._control.start()
            self._events.emit("memory_backstop", **self._live.backstop.open())
            return await self._serve()
        finally:
            await self._shut_down()
            await self._control.close()
            lock.release()

    async def _serve(self) -> Pass:
        stopped = asyncio.create_task(self._stop.wait())
        first = asyncio.create_task(self._first_pass())
        await asyncio.wait([first, stopped], return_when=asyncio.FIRST_COMPLETED)
        if self._stop.is_set():
            self._live.begin_closing()
        if not first.done():
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            return Pass(None, 0, self._given_up, 0.0)
        result = first.result()
        self._settled.set()
        if result.error is None:
            _settle_collector()
            watching = asyncio.create_task(Watcher(self._reconciler).run())
            await asyncio.wait([watching, stopped], return_when=asyncio.FIRST_COMPLETED)
            self._live.begin_closing()
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            result = self._reconciler.last or result
        stopped.cancel()
        return result

    async def _first_pass(self) -> Pass:
        return await self._reconciler.start(self._compiled, Cause("start", this_user()), self._scope, self._first)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted, number)

    def _interrupted(self, number: signal.Signals) -> None:
        """First signal: drain. Second: stop now. Third: leave the rest to the kernel and the engines' grace period."""
        if not self._stop.is_set():
            if number is signal.SIGINT:
                self._given_up = Interrupted("interrupted before everything was up", hint="Nothing of it runs.")
            self._events.emit("stopping", drain_seconds=self._drain_timeout)
            self._stop.set()
        elif self._drain_timeout > 0:
            self._drain_timeout = 0.0
            self._hurry()
        else:
            os._exit(130)

    def _hurry(self) -> None:
        self._events.emit("stopping_now")
        for deployment in self._live.deployments.values():
            if deployment.engine is not None:
                deployment.engine.connection.close()

    async def _shut_down(self) -> None:
        self._live.begin_closing()
        for asked in self._passes:
            asked.cancel()
        await asyncio.gather(*self._passes, return_exceptions=True)
        await self._live.shut_down(self._drain_timeout)
        await asyncio.to_thread(self._compiler.stop)
        self._events.emit("stopped")

    # ------------------------------------------------------------- control requests

    async def _status(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"done": True, **self.status()}

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
            work = self._pass(passing)
            async for event in _until(queue, work):
                yield event
        yield _outcome(work.result())

    def _pass(self, passing: Coroutine[Any, Any, Pass]) -> asyncio.Task[Pass]:
        """Run a pass to its end, whoever waits for it; the runner's own end cancels it."""
        work = asyncio.create_task(passing)
        self._passes.add(work)
        work.add_done_callback(self._passes.discard)
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may have left
        return work

    async def _follow(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What happened so far, and what happens until the first pass has ended."""
        with self._events.subscribe() as queue:
            for event in list(self._events.recent):
                yield event
            async for event in _until(queue, asyncio.create_task(self._settled.wait())):
                yield event
        assert self._reconciler.last is not None, "settled without a pass"
        yield _outcome(self._reconciler.last)

    async def _down(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self._drain_timeout = float(request.get("drain", self._drain_timeout))
        yield {"done": True, "pid": os.getpid(), "drain_seconds": self._drain_timeout}
        self._stop.set()

    async def _history(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for event in self._events.history(follow=bool(request.get("follow"))):
            yield event
        yield {"done": True}

    async def _watch(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The status now and after each change, until stopped or `within` seconds have passed."""
        async for _ in self._events.changes(beat=request.get("beat"), within=request.get("within")):
            yield self.status()
        yield {"done": True}

    def status(self) -> dict[str, Any]:
        """Everything `mlx-run status --json` prints."""
        return {
            "name": self._folder.name,
            "pid": os.getpid(),
            "version": 1,
            "python": sys.version.split()[0],
            "started_at": self._started_at,
            "stopping": self._stop.is_set(),
            **self._reconciler.status(),
            "memory_backstop": self._live.backstop.as_json,
            "servers": [
                {
                    "name": listener.spec.name,
                    "address": listener.spec.url,
                    "models": list(listener.spec.models),
                    "auth": bool(listener.spec.api_keys),
                    "certificate": str(listener.spec.tls.cert) if listener.spec.tls else None,
                }
                for listener in self._live.listeners.values()
            ],
            "models": self._live.model_statuses(self._reconciler.resting),
        }


def _settle_collector() -> None:
    """What start-up has left stays: a full collection need not look at it, which takes 15 ms in which no stream moves.

    Nor are the deltas of one step, for as many rows as there are, a reason for a collection.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _allow_many_files() -> None:
    """Every connection is a file, and macOS allows 256 of them unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def run(
    compiled: Compiled,
    options: Options,
    compiler: Compiler,
    on_event: Callable[[Event], None] | None = None,
    *,
    watch: bool = True,
    scope: Scope = WHOLE,
    timeout: float | None = None,
    frozen: bool = False,
) -> Pass:
    """Run a runner in this process until it is told to stop; the first pass may take `timeout` seconds.

    Raises AlreadyRunning and what its first pass raised.
    """

    async def main() -> Pass:
        runner = Runner(compiled, options, compiler, on_event, watch=watch, scope=scope, timeout=timeout, frozen=frozen)
        return await runner.run()

    return asyncio.run(main())


def raise_for(result: Pass) -> None:
    """Raise what made a pass fail."""
    if isinstance(result.error, MlxRunError):
        raise result.error
