"""The runner process: control and gateway in one event loop, without MLX."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.control.adoption import adopt_engines
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.control_socket import ControlSocket, error_json
from runner.control.download import download
from runner.control.events import Event, EventLog
from runner.control.executor import Live
from runner.control.reconciler import Pass, Reconciler
from runner.control.state_folder import StateFolder
from runner.control.watcher import Watcher, signature
from runner.errors import MlxRunError
from runner.options import Options
from runner.plan.render import plan_json

logger = logging.getLogger(__name__)

_FILES = 8192


class Runner:
    """One runner: everything a name owns while it is up. `on_event` sees each event as it happens."""

    def __init__(
        self, compiled: Compiled, options: Options, compiler: Compiler, on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._compiled = compiled
        self._folder = StateFolder(options.state_dir, compiled.name)
        self._events = EventLog(on_event)
        self._live = Live(self._folder, options, self._events.emit)
        self._compiler = compiler
        self._reconciler = Reconciler(compiled, self._live, self._events, compiler, self._download)
        self._control = ControlSocket(
            self._folder.control_socket,
            {
                "status": self._status,
                "plan": self._plan,
                "apply": self._apply,
                "follow": self._follow,
                "down": self._down,
                "events": self._history,
                "watch": self._watch,
            },
        )
        self._started_at = time.time()
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
            return await self._serve()
        finally:
            await self._shut_down()
            await self._control.close()
            lock.release()

    async def _serve(self) -> Pass:
        seen = signature(self._reconciler.files)
        stopped = asyncio.create_task(self._stop.wait())
        first = asyncio.create_task(self._first_pass())
        await asyncio.wait([first, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            return Pass(None, 0, None, 0.0)
        result = first.result()
        self._settled.set()
        if result.error is None:
            watching = asyncio.create_task(Watcher(self._reconciler).run(seen))
            await asyncio.wait([watching, stopped], return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            result = self._reconciler.last or result
        stopped.cancel()
        return result

    async def _first_pass(self) -> Pass:
        if self._compiled.desired is not None:
            await adopt_engines(self._live, self._compiled.desired)
        return await self._reconciler.reconcile(self._compiled)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted)

    def _interrupted(self) -> None:
        """First signal: drain. Second: stop now. Third: leave the rest to the kernel and the engines' grace period."""
        if not self._stop.is_set():
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
        await self._live.shut_down(self._drain_timeout)
        await asyncio.to_thread(self._compiler.stop)
        self._events.emit("stopped")

    async def _download(self, repo: str, revision: str) -> None:
        await download(repo, revision, self._folder.log)

    # ------------------------------------------------------------- control requests

    async def _status(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"done": True, **self.status()}

    async def _plan(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        made = await self._reconciler.preview(Path(request["manifest"]))
        yield {"done": True, "plan": plan_json(made)}

    async def _apply(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        with self._events.subscribe() as queue:
            work = asyncio.create_task(self._reconciler.apply(Path(request["manifest"])))
            async for event in _until(queue, work):
                yield event
        yield _outcome(work.result())

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
            "servers": [
                {
                    "name": listener.spec.name,
                    "address": f"http://{listener.spec.host}:{listener.spec.port}",
                    "models": list(listener.spec.models),
                    "auth": bool(listener.spec.api_keys),
                }
                for listener in self._live.listeners.values()
            ],
            "models": [d.status() for d in self._live.deployments.values()],
        }


def _allow_many_files() -> None:
    """Every connection is a file, and macOS allows 256 of them unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    compiled: Compiled, options: Options, compiler: Compiler, on_event: Callable[[Event], None] | None = None
) -> Pass:
    """Run a runner in this process until it is told to stop. Raises AlreadyRunning and what its first pass raised."""

    async def main() -> Pass:
        return await Runner(compiled, options, compiler, on_event).run()

    return asyncio.run(main())


def raise_for(result: Pass) -> None:
    """Raise what made a pass fail."""
    if isinstance(result.error, MlxRunError):
        raise result.error
