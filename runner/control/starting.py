"""Brings up a deployment's engines: their weights' folder, their place in memory, the process, and what it has read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner.control.conversion import Conversions
from runner.control.engine_process import EngineProcess
from runner.control.engine_spec import adapter_source, engine_spec
from runner.control.room import Room, Tenant
from runner.control.sources import Sources
from runner.control.state_folder import StateFolder
from runner.options import Options
from runner.plan.spec import ModelSpec
from runner.protocol import EngineSpec


class Starting:
    """`engine` is the one that is not up yet. `gone` is told of each engine that ended by itself."""

    def __init__(
        self,
        tenant: Tenant,
        folder: StateFolder,
        options: Options,
        emit: Callable[..., None],
        room: Room,
        gone: Callable[[EngineProcess], None],
    ) -> None:
        self.engine: EngineProcess | None = None
        self._tenant = tenant
        self._folder = folder
        self._options = options
        self._room = room
        self._gone = gone
        self._sources = Sources()
        self._conversions = Conversions(options.converted, self._sources, folder.engine_log, emit)

    @property
    def stage(self) -> str:
        """How far it is before there is a process."""
        return self._conversions.stage

    async def start(self, spec: ModelSpec) -> EngineProcess:
        """An engine of `spec` that has generated a token. Raises EngineLoadError and EngineDied."""
        async with self._conversions.folder_for(spec) as folder:
            return await self._start(spec, folder)

    async def _start(self, spec: ModelSpec, folder: Path) -> EngineProcess:
        place = await self._room.enter(self._tenant, spec)
        what = engine_spec(spec, folder, self._options, place.budget)
        command = self._options.engine_command
        engine = EngineProcess(what, self._folder, command, self._room.backstop, lambda: self._gone(engine))
        self.engine = place.engine = engine
        try:
            await engine.start()
        except BaseException:
            self._room.leave(place)
            raise
        finally:
            if self.engine is engine:
                self.engine = None
        self._room.watch(place, engine)
        return engine

    async def adopt(self, spec: EngineSpec, engine_id: str) -> EngineProcess:
        """Adopt an engine that an earlier runner left behind; nobody is served by it yet.

        Raises OSError and EngineDied.
        """
        command = self._options.engine_command
        engine = EngineProcess(spec, self._folder, command, self._room.backstop, lambda: self._gone(engine))
        await engine.adopt(engine_id)
        self._room.note(engine, self._tenant.spec)
        return engine

    async def catch_up(self, engine: EngineProcess) -> str:
        """Load the adapters that the manifest gained while this engine was starting. Returns what it has read that is
        not what was planned, empty where nothing is. Raises EngineError; then the engine has ended."""
        try:
            loaded = {a.key for a in engine.spec.adapters}
            while missing := [a for a in self._tenant.spec.adapters if a.key not in loaded]:
                await engine.load_adapter(adapter_source(missing[0]))
                loaded.add(missing[0].key)
            return "; ".join(map(str, await self._sources.changed([self._tenant.spec])))
        except BaseException:
            await engine.kill()  # nobody else knows of it
            raise

    async def abandon(self) -> None:
        """End an engine that is not up yet; whoever waits for it gets EngineDied."""
        self._conversions.abandon()
        if self.engine is not None:
            await self.engine.kill()
