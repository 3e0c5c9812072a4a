"""One engine process from spawn to exit. Whoever starts it holds the only reference that may stop it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import signal
import time
from collections.abc import Callable

import msgspec

from runner.control.adapter_answers import AdapterAnswers, fail
from runner.control.atomic import write_atomically
from runner.control.backstop import Backstop
from runner.control.bounds import Bounds
from runner.control.connection import EngineConnection
from runner.control.postmortem import describe_exit, lack_of_memory, oom_kills
from runner.control.state_folder import StateFolder
from runner.environment import prepared
from runner.errors import EngineDied, EngineLoadError
from runner.processes import python_module
from runner.protocol import (
    VERSION,
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    AdapterSource,
    Configure,
    DropAdapter,
    EngineSpec,
    FromEngine,
    Hello,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Loading,
    Overrun,
    Shutdown,
    Stats,
)

logger = logging.getLogger(__name__)

_CONNECT_RETRY = 0.01
"""Seconds between attempts to reach a socket that the new process has yet to bind; bounded by the process's life."""

_GREETING = 2.0
"""Seconds an engine that was left behind gets to say what it serves."""

_EXIT_GRACE = 5.0
"""Seconds an engine gets to exit by itself once it has nothing left to do."""


class EngineProcess:
    """A process that serves one model: a child, or one that an earlier runner left behind (`adopt`).

    `stage` is what it does until it is ready. `loaded` is set once the model has generated a token. `on_exit` is called
    once when it serves no more, whatever the reason. `overrun` is set where it ended because it used too much memory,
    and `lacked_memory` says so, once it is gone, where there was none left to be had.
    """

    def __init__(
        self, spec: EngineSpec, folder: StateFolder, command: str, backstop: Backstop, on_exit: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.id = secrets.token_hex(4)
        self.bounds = Bounds(backstop)
        self.stage = "starting"
        self.loaded: Loaded | None = None
        self.stats: Stats | None = None
        self.overrun: Overrun | None = None
        self.lacked_memory = ""
        self.started_at = time.time()
        self.loaded_at: float | None = None
        self._folder = folder
        self._command = command
        self._on_exit = on_exit
        self._draining = False
        self.hello: Hello | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False
        self._written_before = self._kills_before = 0
        self._exited = asyncio.Event()
        self._connection: EngineConnection | None = None
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers = AdapterAnswers()
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None before the spawn."""
        if self._process is not None:
            return self._process.pid
        return self.hello.pid if self.hello else None

    @property
    def adopted(self) -> bool:
        """Whether an earlier runner started it."""
        return self._process is None and self.hello is not None

    @property
    def connection(self) -> EngineConnection:
        """The connection of a loaded engine."""
        assert self._connection is not None, "asked for the connection of an engine that never loaded"
        return self._connection

    @property
    def alive(self) -> bool:
        """Whether the process runs and its socket is open."""
        return not self._exited.is_set() and self._connection is not None and not self._connection.lost

    async def start(self) -> None:
        """Spawn, connect, and wait until the model has generated a token.

        Raises EngineLoadError (the model cannot be loaded) and EngineDied (the process ended first). Cancelling it
        ends the process.
        """
        try:
            await self._spawn()
            await self._connect()
            await self._outcome
        except OSError as error:
            await self.kill()
            raise EngineDied(f"the engine of {self.spec.model} could not be started: {error}") from None
        except BaseException:
            await self.kill()
            raise

    async def adopt(self, engine_id: str) -> None:
        """Take over a process that an earlier runner of this name started, if it is loaded and says so soon.

        Raises OSError (nobody listens there any more) and EngineDied (it serves something else, or does not answer).
        """
        self.id = engine_id
        path = self._folder.engine_socket(engine_id)
        self._connection = await EngineConnection.open(path, self._receive, self._lost)
        await asyncio.wait([self._outcome], timeout=_GREETING)
        hello = self.hello
        if self.loaded is None or hello is None or (hello.version, hello.digest) != (VERSION, self.spec.digest):
            self._draining = True
            self._connection.send(Shutdown(0.0))
            self._connection.close()
            raise EngineDied(f"the engine of {self.spec.model} that was left behind cannot be adopted")
        self.bounds.found(engine_id, self.spec)
        self.started_at = self._folder.engine_spec(engine_id).stat().st_mtime
        self.loaded_at = self.started_at + self.loaded.seconds
        logger.info("engine adopted", extra={"model": self.spec.model, "pid": hello.pid})

    async def _spawn(self) -> None:
        spec_path = self._folder.engine_spec(self.id)
        group = self.bounds.enclose(self.id, self.spec)
        self.spec = msgspec.structs.replace(self.spec, control_group=group)
        write_atomically(spec_path, msgspec.json.encode(self.spec))
        command, environ = python_module("runner.engine"), prepared(os.environ, time.monotonic())
        if self._command:  # which may not be our Python, and finds out for itself
            command, environ = shlex.split(self._command), dict(os.environ)
        with self._folder.engine_log(self.spec.model).open("ab") as log:
            self._written_before, self._kills_before = log.tell(), oom_kills()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                "--spec",
                str(spec_path),
                "--socket",
                str(self._folder.engine_socket(self.id)),
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for the runner, which then drains its engines.
                start_new_session=True,
            )
        logger.info("engine started", extra={"model": self.spec.model, "pid": self._process.pid})
        self._watch = asyncio.create_task(self._wait_exit(self._process))

    async def _connect(self) -> None:
        path = self._folder.engine_socket(self.id)
        while not self._outcome.done():
            try:
                self._connection = await EngineConnection.open(path, self._receive, self._lost)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.wait([self._outcome], timeout=_CONNECT_RETRY)
            else:
                return

    async def _wait_exit(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self.lacked_memory = lack_of_memory(
            code,
            killed_by_us=self._killed,
            over=self.bounds.broken,
            kills_before=self._kills_before,
            log=self._folder.engine_log(self.spec.model),
            written_before=self._written_before,
        )
        self.bounds.release()
        self._exited.set()
        logger.info("engine exited", extra={"model": self.spec.model, "pid": process.pid, "code": code})
        self._folder.forget_engine(self.id)
        if self._connection is not None:
            self._connection.close()
        why = f": {self.lacked_memory}" if self.lacked_memory else ""
        self._fail(EngineDied(f"the engine of {self.spec.model} {describe_exit(code)}{why}", hint=self._log_hint()))
        self._gone()

    def _log_hint(self) -> str:
        return f"Its output: `mlx-run logs {self.spec.model}`."

    def _fail(self, error: EngineDied | EngineLoadError) -> None:
        fail(self._outcome, error)
        self._answers.fail(error)

    def _lost(self) -> None:
        # An engine whose socket is gone is of no use, even if the process hangs on; and the next request must not
        # find it while its exit is still on the way.
        if self.loaded is not None:
            if not self._draining:
                self._signal(signal.SIGKILL)
            if self._process is None:  # adopted: not a child, so its socket is all there is to wait for
                self.lacked_memory = self.bounds.broken
                self.bounds.release()
                self._exited.set()
                self._folder.forget_engine(self.id)
            self._gone()

    def _gone(self) -> None:
        on_exit, self._on_exit = self._on_exit, _nothing
        on_exit()

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Loading(stage=stage):
                self.stage = stage
            case Hello(version=version):
                self.hello = message
                if version != VERSION:
                    reason = f"its engine speaks version {version} of the protocol, and this runner {VERSION}"
                    self._fail(EngineLoadError(f"{self.spec.model}: {reason}"))
            case Loaded():
                self.loaded, self.loaded_at, self.stage = message, time.time(), "ready"
                if not self._outcome.done():
                    self._outcome.set_result(None)
            case LoadFailed(reason=reason, hint=hint):
                self._fail(EngineLoadError(f"{self.spec.model}: {reason}", hint=hint))
            case AdapterLoaded(key=key) | AdapterDropped(key=key):
                self._answers.settle(key)
            case AdapterRefused(key=key, reason=reason):
                self._answers.settle(key, EngineLoadError(reason))
            case Stats():
                self.stats = message
                self.bounds.kept_to(message.budget_bytes)
            case Overrun():
                self.overrun = message
            case _:
                pass

    async def load_adapter(self, adapter: AdapterSource) -> None:
        """Make an adapter resident. Raises EngineLoadError (refused, with the reason) and EngineDied."""
        await self._ask(adapter.key, LoadAdapter(adapter))

    async def drop_adapter(self, key: str) -> None:
        """Take no new rows for an adapter; running rows finish. Raises EngineDied."""
        await self._ask(key, DropAdapter(key))

    async def _ask(self, key: str, message: LoadAdapter | DropAdapter) -> None:
        if not self.alive:
            raise EngineDied(f"the engine of {self.spec.model} is gone", hint=self._log_hint())
        answer = self._answers.expect(key)
        self.connection.send(message)
        await answer

    def rename(self, model: str) -> None:
        """Serve as `model` from now on; a later runner finds it under that name. Raises OSError."""
        self.spec = msgspec.structs.replace(self.spec, model=model)
        write_atomically(self._folder.engine_spec(self.id), msgspec.json.encode(self.spec))

    def budget(self, memory_limit: int) -> None:
        """Have it keep to so many bytes from now on."""
        self.bounds.told(memory_limit)
        self.connection.send(Configure(memory_limit_bytes=memory_limit))

    async def gone(self) -> None:
        """Return once the process has ended."""
        await self._exited.wait()

    def configure(self, limits: Configure) -> None:
        """Change limits in place."""
        self.connection.send(limits)

    async def drain(self, deadline: float) -> None:
        """Let running requests finish for at most `deadline` seconds, then end the process."""
        self._draining = True
        if self.alive:
            try:
                async with asyncio.timeout(deadline):
                    await self.connection.wait_idle()
            except TimeoutError:
                logger.warning(
                    "requests were cut at the drain deadline",
                    extra={"model": self.spec.model, "count": self.connection.in_flight},
                )
                self.connection.cut(
                    f"cut at the drain deadline ({deadline:g} s): the model is being replaced or stopped"
                )
            self.connection.send(Shutdown(0.0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_GRACE):
                    await self._exited.wait()
        await self.kill()

    async def kill(self) -> None:
        """End the process now and wait until it is gone."""
        if self.pid is None:
            self.bounds.release()
            return
        self._killed = True
        self._signal(signal.SIGKILL)
        if self._watch is not None:
            if asyncio.current_task() is not self._watch:
                await asyncio.shield(self._watch)
        elif self.loaded is not None:
            await self._exited.wait()

    def _signal(self, number: signal.Signals) -> None:
        # Not by Process.kill: that polls first, and so takes the exit code away from asyncio's own wait.
        if self.pid is not None and not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _nothing() -> None:
    """Nobody is to be told any more."""
