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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from runner.control.admin import Admin, Places
from runner.control.attempt import Attempt
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.control_socket import ControlSocket
from runner.control.events import Event, EventLog
from runner.control.ledger import Cause
from runner.control.live import Live
from runner.control.reconciler import Pass, Reconciler
from runner.control.requests import FEEDS, Requests
from runner.control.state_folder import StateFolder
from runner.control.watcher import Watcher
from runner.control.who import this_user
from runner.errors import Interrupted, MlxRunError
from runner.options import Options
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
        self._reconciler.followed.watching = watch
        self._reconciler.followed.frozen = frozen
        requests = Requests(self._reconciler, self._live, self._events, self.status, self._end)
        servers = lambda: list(self._live.listeners)  # noqa: E731
        places = Places(options.state_dir, self._folder.log, options.converted)
        self._live.admin = Admin(self._reconciler, self.status, servers, requests.carry_through, places, self._events)
        self._requests = requests
        self._control = ControlSocket(self._folder.control_socket, requests.handlers, FEEDS)
        self._scope = scope
        self._first = Attempt(timeout)
        self._given_up: Interrupted | None = None
        self._started_at = time.time()
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
        self._requests.settled.set()
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

    def _end(self, drain: float | None) -> float:
        """Begin to stop; `drain` seconds for what is running, None for the settings' own. Returns how many.

        While it stops already, what is running gets no more than `drain` from now.
        """
        self._drain_timeout = self._drain_timeout if drain is None else drain
        if self._stop.is_set():
            self._live.in_background(self._live.drain(self._drain_timeout))
        self._stop.set()
        return self._drain_timeout

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
        for engine in self._live.room.engines:
            engine.connection.close()

    async def _shut_down(self) -> None:
        self._live.begin_closing()
        await self._requests.abandon()
        await self._live.shut_down(self._drain_timeout)
        await asyncio.to_thread(self._compiler.stop)
        self._events.emit("stopped")

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
