"""One served model as the rest of the runner sees it: the object stays while engines come, crash and go.

The reconciler decides which spec a deployment has; the deployment keeps an engine of that spec alive, as a kubelet
does for a container. It is the only writer of its own state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from runner.control.adapter_versions import AdapterVersions
from runner.control.demand import Demand
from runner.control.engine_process import EngineProcess
from runner.control.engine_spec import configure
from runner.control.health import Health
from runner.control.held_requests import HeldRequests
from runner.control.restarts import Restarts
from runner.control.room import Room
from runner.control.starting import Starting
from runner.control.state_folder import StateFolder
from runner.control.unloading import Unloading
from runner.errors import EngineDied, EngineError, RequestError
from runner.options import Options
from runner.plan.spec import ModelSpec
from runner.protocol import Delta, Generate, Stats

logger = logging.getLogger(__name__)

_AT_REST = ("idle", "loading", "replacing")
"""States in which a model that is loaded on demand takes requests without an engine."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a deployment stands, so that a commit that fails halfway can be taken back."""

    spec: ModelSpec
    engine: EngineProcess | None
    state: str
    last_error: str


class Deployment:
    """Implements `runner.gateway.backend.Deployment`.

    `state` is pending, loading, ready, idle (loads at the next request), backoff, replacing, stopped.
    """

    def __init__(
        self, spec: ModelSpec, folder: StateFolder, options: Options, on_event: Callable[..., None], room: Room
    ) -> None:
        self.spec = spec
        self.last_error = ""
        self.restarts = 0
        self.engine: EngineProcess | None = None
        self.starting = Starting(self, folder, options, on_event, room, self._engine_gone)
        self._options = options
        self._on_event = on_event
        self._restarts = Restarts(self, on_event)
        self.health = Health(lambda: f"models.{self.name}", on_event, self._restarts.stable)
        self._state = "pending"
        self._room = room
        self._demand = Demand(self, on_event)
        self.held = HeldRequests(self, self._demand, options.load_wait)
        self._using = 0
        self._explaining: asyncio.Task[None] | None = None
        self._unloading = Unloading(options.drain_timeout)
        self._adapters = AdapterVersions()
        self._adapters.remember(spec)

    @property
    def state(self) -> str:
        """What it is doing."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self.health.follow(
            state, self.last_error, adopted=self.engine is not None and self.engine.adopted, on_demand=self.rests
        )

    # ------------------------------------------------------------- gateway's side

    @property
    def name(self) -> str:
        """The manifest's name for it."""
        return self.spec.name

    @property
    def ready(self) -> bool:
        """Whether it takes requests: an engine has generated a token, or one is loaded when it is asked for."""
        return self.engine is not None or (self.rests and self.state in _AT_REST and not self.last_error)

    @property
    def loaded(self) -> bool:
        """Whether an engine is up."""
        return self.engine is not None

    @property
    def rests(self) -> bool:
        """Whether it is as it should be that no engine is up."""
        return self.spec.load == "on_demand" or self.state == "idle" or self._demand.loading

    @property
    def busy(self) -> bool:
        """Whether requests are in its engine, or wait for it."""
        return self._using > 0

    @property
    def used_at(self) -> float:
        """When a request last ended, by `time.monotonic`."""
        return self._demand.used_at

    @property
    def stats(self) -> Stats | None:
        """The engine's last counters."""
        return self.engine.stats if self.engine else None

    async def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        """See the interface."""
        self._using += 1
        try:
            engine = self.engine
            if engine is None:
                engine = await self.held.engine()
            request = self._adapters.current(request, self.spec)
            async with aclosing(engine.connection.generate(request)) as deltas:
                async for some in deltas:
                    yield some
        finally:
            self._using -= 1
            if not self._using:
                self._demand.used()
                self._room.touch()

    # ------------------------------------------------------------- reconciler's side

    async def bring_up(self, spec: ModelSpec) -> EngineProcess:
        """Start an engine of `spec` and prove it with one token; it serves nothing until `switch`.

        Raises EngineLoadError and EngineDied.
        """
        if self.engine is None:
            self.state = "loading"
        try:
            return await self.starting.start(spec)
        except EngineError as error:
            self.last_error = str(error)
            raise

    def switch(self, spec: ModelSpec, engine: EngineProcess) -> EngineProcess | None:
        """Serve from `engine` from now on. Returns the engine that served before, for the caller to drain."""
        self.health.recovered()
        self.health.sources_changed("")
        return self._serve(spec, engine)

    def _serve(self, spec: ModelSpec, engine: EngineProcess) -> EngineProcess | None:
        self._restarts.cancel()
        self._demand.cancel()
        old, self.engine = self.engine, engine
        self.adopt(spec)
        self.last_error = ""
        self.state = "ready"
        self._restarts.started()
        self.held.let_go()
        self._demand.used()
        if not engine.alive:  # it died between its first token and now
            self._engine_gone(engine)
        return old

    def adopt(self, spec: ModelSpec) -> None:
        """Take over a spec that needs no other process; sends changed limits to the engine."""
        changed = spec.limits != self.spec.limits
        if spec != self.spec:
            self.health.sources_changed("")
        self.spec = spec
        self._adapters.remember(spec)
        if self.engine is not None:
            self._demand.rearm()
        if changed and self.engine is not None and self.engine.alive:
            self.engine.configure(configure(spec.limits))

    async def park(self) -> None:
        """Drain and end the engine while requests wait for its successor."""
        self._restarts.cancel()
        self._demand.cancel()
        self.state = "replacing"
        engine = self._release()
        if engine is not None:
            try:
                await engine.drain(self._options.drain_timeout)
            except BaseException:
                await engine.kill()  # nobody else knows of it any more
                raise

    async def unpark(self, spec: ModelSpec) -> None:
        """Serve `spec` again. An engine that does not come up is tried again, as after a crash."""
        if spec.load == "on_demand":
            self.rest(spec)
            return
        try:
            self.switch(spec, await self.bring_up(spec))
        except EngineError as error:
            logger.warning("engine did not come back", extra={"model": spec.name, "error": str(error)})
            self.adopt(spec)
            self._restarts.begin()

    def rest(self, spec: ModelSpec) -> EngineProcess | None:
        """Serve `spec` with an engine that is loaded at the next request. Returns the one that served, for the caller
        to end."""
        self._restarts.cancel()
        self._demand.cancel()
        engine = self._release()
        self.adopt(spec)
        self.last_error = ""
        self.state = "idle"
        self.held.wake()
        return engine

    async def be_loaded(self) -> None:
        """Have an engine up, whoever asks for it. Raises EngineDied where none comes up."""
        if self.engine is None and self.state in ("idle", "loading"):
            try:
                self._demand.ask()
            except RequestError as error:
                raise EngineDied(error.message) from None
            await self._demand.wait()
        if self._demand.failure is not None and self.engine is None:
            raise EngineDied(self._demand.failure.message)

    @property
    def standing(self) -> Standing:
        """How it stands now."""
        return Standing(self.spec, self.engine, self.state, self.last_error)

    def reset(self, standing: Standing) -> None:
        """Stand as before. Nothing may have been awaited since."""
        self.engine = standing.engine
        self.adopt(standing.spec)
        self.last_error = standing.last_error
        self.state = standing.state
        if self.engine is not None:
            self.held.let_go()
        else:
            self.held.hold()
            if self.state == "backoff":
                self.health.died(self.last_error)
                self._restarts.begin()

    async def stop(self, *, deadline: float | None = None) -> None:
        """Drain and end the engine for good. `deadline` in seconds, the settings' drain timeout by default."""
        self.state = "stopped"
        self._restarts.cancel()
        self._demand.cancel()
        await self.starting.abandon()
        engine = self._release()
        self.held.let_go()  # whoever waits is told
        deadline = self._options.drain_timeout if deadline is None else deadline
        ending = [*self._unloading.hand_over(), *([engine] if engine is not None else [])]
        await asyncio.gather(*(one.drain(deadline) for one in ending))

    async def kill(self) -> None:
        """End the engine now."""
        await self.stop(deadline=0.0)

    def _release(self) -> EngineProcess | None:
        engine, self.engine = self.engine, None
        self.held.hold()
        return engine

    # ------------------------------------------------------------- keeping it alive

    def _engine_gone(self, engine: EngineProcess) -> None:
        if engine is not self.engine:
            return
        self.engine = None
        self.held.hold()
        self.last_error = f"the engine (pid {engine.pid}) {_how_it_ended(engine)}"
        self.state = "idle" if self.spec.load == "on_demand" else "backoff"
        self.health.died(self.last_error)
        self._on_event("engine_died", target=f"models.{self.name}", pid=engine.pid)
        self._explaining = asyncio.create_task(self._explain(engine))
        if self.spec.load == "on_demand":
            self.held.wake()  # it is loaded again by the next request, or by one that waits
        else:
            self._restarts.begin()

    async def _explain(self, engine: EngineProcess) -> None:
        """Say where it was memory that an engine died of; the process's end tells, which comes after its socket's."""
        target = f"models.{self.name}"
        if engine.overrun is not None:
            self._on_event("engine_over_memory", target=target, used=engine.overrun.used, limit=engine.overrun.limit)
            return
        await engine.gone()
        if engine.lacked_memory:
            self.health.died(engine.lacked_memory)
            if self.engine is None:
                self.last_error = engine.lacked_memory
            self._on_event("engine_out_of_memory", target=target, reason=engine.lacked_memory)

    async def load(self) -> None:
        """Bring up an engine of the current spec and serve from it. Raises EngineError."""
        while True:
            engine, changed = await self.bring_up_again()
            if engine.spec.digest == self.spec.process_digest:
                break
            await engine.kill()  # an edit came meanwhile
        self._serve(self.spec, engine)
        self.health.recovered()
        self.health.sources_changed(changed)

    def load_failed(self, error: EngineError) -> None:
        """A load that was asked for came to nothing."""
        self.last_error = str(error)
        self.state = "idle"
        self.held.wake()

    def unload(self, reason: str) -> None:
        """End the engine once it has finished what it works on; the next request loads another."""
        engine = self.rest(self.spec)
        if engine is None:
            return
        self._on_event("unloaded", target=f"models.{self.name}", reason=reason)
        self._room.leaving(engine)
        self._unloading.begin(engine)

    def came_back(self, engine: EngineProcess, changed: str) -> None:
        """Serve from an engine that takes the place of one that ended; `changed` as from `bring_up_again`."""
        self.restarts += 1
        self._serve(self.spec, engine)
        self.health.came_back()
        self.health.sources_changed(changed)
        self._on_event("engine_restarted", target=f"models.{self.name}", pid=engine.pid)

    async def bring_up_again(self) -> tuple[EngineProcess, str]:
        """An engine of the current spec, and what it has read that is not what was planned: whatever is there now is
        better than nothing. Raises EngineError."""
        engine = await self.bring_up(self.spec)
        return engine, await self.starting.catch_up(engine)


def _how_it_ended(engine: EngineProcess) -> str:
    if engine.overrun is None:
        return "ended unexpectedly"
    return f"used {engine.overrun.used:,} bytes where {engine.overrun.limit:,} are its limit, and starts again"
