"""One served model as the rest of the runner sees it: the object stays while engines come, crash and go.

The reconciler decides which spec a deployment has; the deployment keeps an engine of that spec alive, as a kubelet
does for a container. It is the only writer of its own state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from runner.control.backoff import Backoff
from runner.control.conversion import Conversions
from runner.control.demand import Demand
from runner.control.engine_process import EngineProcess
from runner.control.health import Health
from runner.control.room import Holding, Room
from runner.control.sources import Sources
from runner.control.state_folder import StateFolder
from runner.errors import EngineDied, EngineError, NotServed, RequestError, Unavailable
from runner.options import Options
from runner.plan.spec import AdapterSpec, ModelSpec
from runner.protocol import AdapterSource, Configure, Delta, EngineSpec, Generate, Stats

logger = logging.getLogger(__name__)

_AT_REST = ("idle", "loading", "replacing")
"""States in which a model that is loaded on demand takes requests without an engine."""

_MAX_WAITING = 1024
"""Requests that may wait for an engine to load; more are told to come back."""


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
        self._starting: EngineProcess | None = None
        self._folder = folder
        self._options = options
        self._on_event = on_event
        self._backoff = Backoff()
        self.health = Health(lambda: f"models.{self.name}", on_event, self._backoff.stable)
        self._state = "pending"
        self._room = room
        self._demand = Demand(self, on_event)
        self._using = 0
        self._explaining: asyncio.Task[None] | None = None
        self._unloading: dict[EngineProcess, asyncio.Task[None]] = {}
        self._sources = Sources()
        self._conversions = Conversions(options.converted, self._sources, folder.engine_log, on_event)
        self._restart: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._waiting = 0
        self._adapter_names: dict[str, str] = {}
        self._remember_adapters(spec)

    @property
    def state(self) -> str:
        """What it is doing."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self.health.follow(
            state, self.last_error, adopted=self.engine is not None and self.engine.adopted, on_demand=self._rests
        )

    # ------------------------------------------------------------- gateway's side

    @property
    def name(self) -> str:
        """The manifest's name for it."""
        return self.spec.name

    @property
    def ready(self) -> bool:
        """Whether it takes requests: an engine has generated a token, or one is loaded when it is asked for."""
        return self.engine is not None or (self._rests and self.state in _AT_REST and not self.last_error)

    @property
    def loaded(self) -> bool:
        """Whether an engine is up."""
        return self.engine is not None

    @property
    def _rests(self) -> bool:
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
                engine = await self._wait_for_engine()
            if request.adapter:
                request = self._with_current_adapter(request)
            async with aclosing(engine.connection.generate(request)) as deltas:
                async for some in deltas:
                    yield some
        finally:
            self._using -= 1
            if not self._using:
                self._demand.used()
                self._room.touch()

    async def _wait_for_engine(self) -> EngineProcess:
        if self.state == "stopped":
            raise self._not_served()
        if self._waiting >= _MAX_WAITING:
            raise Unavailable(f"too many requests wait for {self.name!r} to load", retry_after=5.0)
        self._waiting += 1
        try:
            # Not wait_for: before Python 3.12 it can lose a cancellation that comes as its wait completes.
            async with asyncio.timeout(self._options.load_wait):
                await self._be_ready()
        except TimeoutError:
            reason = f": {self.last_error.splitlines()[0]}" if self.last_error else ""
            raise Unavailable(
                f"the model {self.name!r} is not ready ({self.state}){reason}", retry_after=5.0, code="model_loading"
            ) from None
        finally:
            self._waiting -= 1
        if self.state == "stopped":
            raise self._not_served()
        if self.engine is None:
            raise Unavailable(f"the model {self.name!r} is not ready ({self.state})", retry_after=1.0)
        return self.engine

    async def _be_ready(self) -> None:
        """Return once an engine is up, or none will be. Raises why a load that was asked for came to nothing."""
        while self.engine is None and self.state != "stopped":
            if self.state == "idle":
                self._demand.ask()
            await self._ready.wait()
            if self.engine is None and self.state == "idle" and self._demand.failure is not None:
                raise self._demand.failure

    def _not_served(self) -> NotServed:
        return NotServed(f"the model {self.name!r} is not served any more", param="model", code="model_not_found")

    def _with_current_adapter(self, request: Generate) -> Generate:
        """A request that was routed before an edit and has no row yet gets the adapter's current version."""
        if any(a.key == request.adapter for a in self.spec.adapters):
            return request
        name = self._adapter_names.get(request.adapter, request.adapter)
        adapter = self.spec.adapter(name)
        if adapter is None:
            raise NotServed(
                f"the model {self.name!r} has no adapter {name!r}", param="adapter_name", code="adapter_not_found"
            )
        return msgspec.structs.replace(request, adapter=adapter.key)

    def _remember_adapters(self, spec: ModelSpec) -> None:
        self._adapter_names.update({a.key: a.name for a in spec.adapters})

    # ------------------------------------------------------------- reconciler's side

    async def bring_up(self, spec: ModelSpec) -> EngineProcess:
        """Start an engine of `spec` and prove it with one token; it serves nothing until `switch`.

        Raises EngineLoadError and EngineDied.
        """
        if self.engine is None:
            self.state = "loading"
        try:
            folder = await self._conversions.folder_for(spec)
            return await self._start(spec, folder, await self._room.enter(self, spec))
        except EngineError as error:
            self.last_error = str(error)
            raise

    async def _start(self, spec: ModelSpec, folder: Path, place: Holding) -> EngineProcess:
        engine_spec = _engine_spec(spec, folder, self._options, place.budget)
        command = self._options.engine_command
        engine = EngineProcess(engine_spec, self._folder, command, lambda: self._engine_gone(engine))
        self._starting = place.engine = engine
        try:
            await engine.start()
        except BaseException:
            self._room.leave(place)
            raise
        finally:
            if self._starting is engine:
                self._starting = None
        self._room.watch(place, engine)
        return engine

    async def take_over(self, spec: EngineSpec, engine_id: str) -> EngineProcess:
        """Adopt an engine that an earlier runner left behind; it serves nothing until `switch`.

        Raises OSError and EngineDied.
        """
        command = self._options.engine_command
        engine = EngineProcess(spec, self._folder, command, lambda: self._engine_gone(engine))
        await engine.adopt(engine_id)
        self._room.note(engine, self.spec)
        return engine

    def switch(self, spec: ModelSpec, engine: EngineProcess) -> EngineProcess | None:
        """Serve from `engine` from now on. Returns the engine that served before, for the caller to drain."""
        self.health.recovered()
        self.health.sources_changed("")
        return self._serve(spec, engine)

    def _serve(self, spec: ModelSpec, engine: EngineProcess) -> EngineProcess | None:
        self._stop_restarting()
        self._demand.cancel()
        old, self.engine = self.engine, engine
        self.adopt(spec)
        self.last_error = ""
        self.state = "ready"
        self._backoff.started(time.monotonic())
        self._ready.set()
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
        self._remember_adapters(spec)
        if self.engine is not None:
            self._demand.rearm()
        if changed and self.engine is not None and self.engine.alive:
            limits = spec.limits
            self.engine.configure(
                Configure(
                    max_rows=limits.max_rows,
                    max_queue=limits.max_queue,
                    prefill_step_size=limits.prefill_step_size,
                    max_context=limits.max_context,
                    prefix_cache_bytes=limits.prefix_cache_bytes,
                    num_draft_tokens=limits.num_draft_tokens,
                )
            )

    async def park(self) -> None:
        """Drain and end the engine while requests wait for its successor."""
        self._stop_restarting()
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
            self._keep_alive()

    def rest(self, spec: ModelSpec) -> EngineProcess | None:
        """Serve `spec` with an engine that is loaded at the next request. Returns the one that served, for the caller
        to end."""
        self._stop_restarting()
        self._demand.cancel()
        engine = self._release()
        self.adopt(spec)
        self.last_error = ""
        self.state = "idle"
        self._wake()
        return engine

    def _wake(self) -> None:
        """Have those that wait look at how things are."""
        self._ready.set()
        self._ready.clear()

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
            self._ready.set()
        else:
            self._ready.clear()
            if self.state == "backoff":
                self.health.died(self.last_error)
                self._keep_alive()

    async def stop(self, *, deadline: float | None = None) -> None:
        """Drain and end the engine for good. `deadline` in seconds, the settings' drain timeout by default."""
        self.state = "stopped"
        self._stop_restarting()
        self._demand.cancel()
        await self.abandon_start()
        engine = self._release()
        self._ready.set()  # whoever waits is told
        deadline = self._options.drain_timeout if deadline is None else deadline
        for unloading in self._unloading.values():
            unloading.cancel()
        ending = [*self._unloading, *([engine] if engine is not None else [])]
        await asyncio.gather(*(one.drain(deadline) for one in ending))

    async def abandon_start(self) -> None:
        """End an engine that is not up yet; whoever waits for it gets EngineDied."""
        self._conversions.abandon()
        if self._starting is not None:
            await self._starting.kill()

    async def kill(self) -> None:
        """End the engine now."""
        await self.stop(deadline=0.0)

    def _release(self) -> EngineProcess | None:
        engine, self.engine = self.engine, None
        self._ready.clear()
        return engine

    # ------------------------------------------------------------- keeping it alive

    def _engine_gone(self, engine: EngineProcess) -> None:
        if engine is not self.engine:
            return
        self.engine = None
        self._ready.clear()
        self.last_error = f"the engine (pid {engine.pid}) {_how_it_ended(engine)}"
        self.state = "idle" if self.spec.load == "on_demand" else "backoff"
        self.health.died(self.last_error)
        self._on_event("engine_died", target=f"models.{self.name}", pid=engine.pid)
        self._explaining = asyncio.create_task(self._explain(engine))
        if self.spec.load == "on_demand":
            self._wake()  # it is loaded again by the next request, or by one that waits
        else:
            self._keep_alive()

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
            engine, changed = await self._bring_up_again()
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
        self._wake()

    def unload(self, reason: str) -> None:
        """End the engine once it has finished what it works on; the next request loads another."""
        engine = self.rest(self.spec)
        if engine is None:
            return
        self._on_event("unloaded", target=f"models.{self.name}", reason=reason)
        self._room.leaving(engine)

        async def finish() -> None:
            if engine.alive:
                await engine.connection.wait_idle()
            await engine.drain(self._options.drain_timeout)

        task = self._unloading[engine] = asyncio.create_task(finish())
        task.add_done_callback(lambda _: self._unloading.pop(engine, None))

    def _keep_alive(self) -> None:
        if self._restart is None:
            self._restart = asyncio.create_task(self._bring_back())

    async def _bring_back(self) -> None:
        while self.state != "stopped":
            delay = self._backoff.failed(time.monotonic())
            self.state = "backoff"
            self._on_event("engine_backoff", target=f"models.{self.name}", seconds=delay)
            await asyncio.sleep(delay)
            try:
                engine, changed = await self._bring_up_again()
            except EngineError as error:
                logger.warning("engine did not come back", extra={"model": self.name, "error": str(error)})
                continue
            self.restarts += 1
            self._serve(self.spec, engine)
            self.health.came_back()
            self.health.sources_changed(changed)
            self._on_event("engine_restarted", target=f"models.{self.name}", pid=engine.pid)
            return  # should it have died already, another task has taken over

    async def _bring_up_again(self) -> tuple[EngineProcess, str]:
        """An engine of the current spec, and what it has read that is not what was planned: whatever is there now is
        better than nothing. Raises EngineError."""
        engine = await self.bring_up(self.spec)
        try:
            await self._catch_up(engine)
            return engine, "; ".join(map(str, await self._sources.changed([self.spec])))
        except BaseException:
            await engine.kill()  # nobody else knows of it
            raise

    async def _catch_up(self, engine: EngineProcess) -> None:
        """Load the adapters that the manifest gained while this engine was starting."""
        loaded = {a.key for a in engine.spec.adapters}
        while missing := [a for a in self.spec.adapters if a.key not in loaded]:
            await engine.load_adapter(adapter_source(missing[0]))
            loaded.add(missing[0].key)

    def _stop_restarting(self) -> None:
        restart, self._restart = self._restart, None
        if restart is not None and restart is not asyncio.current_task():
            restart.cancel()

    # ------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """What `mlx-run status` shows, as plain data. Times are seconds since the epoch, sizes bytes."""
        engine = self.engine or self._starting
        loaded, stats = (engine.loaded, engine.stats) if engine else (None, None)
        return {
            "name": self.name,
            "state": self.state,
            "on_demand": self._rests,
            "loaded": self.loaded,
            "stage": engine.stage if engine else self._conversions.stage,
            "source": self.spec.source,
            "digest": self.spec.weights_digest,
            "aliases": list(self.spec.aliases),
            "adapters": [{"name": a.name, "key": a.key} for a in self.spec.adapters],
            "draft": self.spec.draft.source if self.spec.draft else None,
            "drafted_tokens": stats.drafted_tokens_total if stats else 0,
            "accepted_tokens": stats.accepted_tokens_total if stats else 0,
            "default_adapter": self.spec.default_adapter,
            "pid": engine.pid if engine else None,
            "started_at": engine.started_at if engine else None,
            "loaded_at": engine.loaded_at if engine else None,
            "load_seconds": loaded.seconds if loaded else None,
            "device": loaded.device if loaded else "",
            "notes": loaded.notes if loaded else [],
            "weights_bytes": self.spec.weights_bytes,
            "active_bytes": stats.active_bytes if stats else (loaded.active_bytes if loaded else None),
            "rows": stats.rows if stats else 0,
            "waiting": (stats.waiting if stats else 0) + self._waiting,
            "in_flight": engine.connection.in_flight if engine and engine.alive else 0,
            "restarts": self.restarts,
            "last_error": self.last_error,
            "conditions": self.health.as_json,
        }


def _how_it_ended(engine: EngineProcess) -> str:
    if engine.overrun is None:
        return "ended unexpectedly"
    return f"used {engine.overrun.used:,} bytes where {engine.overrun.limit:,} are its limit, and starts again"


def absent(name: str) -> dict[str, Any]:
    """The status of a model that is wanted and has no deployment yet: the same fields, with nothing in them."""
    nothing = Health(lambda: f"models.{name}", lambda *_, **__: None, 0.0)
    return {
        **dict.fromkeys(("pid", "started_at", "loaded_at", "load_seconds", "active_bytes")),
        **dict.fromkeys(("stage", "source", "digest", "device", "last_error"), ""),
        **dict.fromkeys(("weights_bytes", "rows", "waiting", "in_flight", "restarts"), 0),
        **dict.fromkeys(("drafted_tokens", "accepted_tokens"), 0),
        "aliases": [],
        "adapters": [],
        "notes": [],
        "name": name,
        "state": "pending",
        "on_demand": False,
        "loaded": False,
        "default_adapter": None,
        "draft": None,
        "conditions": nothing.as_json,
    }


def _engine_spec(spec: ModelSpec, folder: Path, options: Options, budget: int) -> EngineSpec:
    return EngineSpec(
        model=spec.name,
        path=str(folder),
        digest=spec.process_digest,
        adapters=tuple(adapter_source(a) for a in spec.adapters),
        max_rows=spec.limits.max_rows,
        max_queue=spec.limits.max_queue,
        prefill_step_size=spec.limits.prefill_step_size,
        max_context=spec.limits.max_context,
        prefix_cache_bytes=spec.limits.prefix_cache_bytes,
        memory_limit_bytes=spec.memory_limit_bytes,
        budget_bytes=budget,
        row_bytes=spec.memory.kv_row if spec.memory.exact and spec.memory.context else 0,
        working_bytes=spec.memory.working(spec.limits.prefill_step_size),
        draft=str(spec.draft.path) if spec.draft else "",
        num_draft_tokens=spec.limits.num_draft_tokens,
        dtype=spec.dtype,
        kv_bits=spec.kv_cache.bits if spec.kv_cache else 0,
        kv_group_size=spec.kv_cache.group_size if spec.kv_cache else 64,
        chat_template=str(spec.chat_template.path) if spec.chat_template else "",
        tool_parser=spec.tool_parser,
        orphan_grace=options.orphan_grace,
    )


def adapter_source(adapter: AdapterSpec) -> AdapterSource:
    """An adapter as the engine takes it."""
    return AdapterSource(key=adapter.key, path=str(adapter.path), scale=adapter.scale)
