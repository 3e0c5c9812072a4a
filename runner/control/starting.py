"""Brings up a deployment's engines: their weights' folder, their place in memory, the process, and what it has read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runner.control.conversion import Conversions
from runner.control.engine_process import EngineProcess
from runner.control.engine_spec import adapter_source, configure, engine_spec
from runner.control.room import Room, Tenant
from runner.control.sources import Sources
from runner.control.state_folder import StateFolder
from runner.errors import EngineDied, EngineError
from runner.options import Options
from runner.plan.spec import AdapterSpec, ModelSpec
from runner.protocol import EngineSpec

logger = logging.getLogger(__name__)


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
        with _nothing_else(spec.name):
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
        """Have an engine hold the adapters and keep to the limits that its model has now: both may have been edited
        while it was starting, and nothing was there to be told.

        Returns what it has read that is not what was planned, empty where nothing is. Raises EngineError; then the
        engine has ended.
        """
        try:
            held = {a.key for a in engine.spec.adapters}
            while True:
                spec = self._tenant.spec
                with _nothing_else(spec.name):
                    await self._hold(engine, spec.adapters, held)
                    changed = await self._sources.changed([spec])
                if self._tenant.spec is spec:
                    break  # and nothing is awaited from here until it serves
        except BaseException:
            await engine.kill()  # nobody else knows of it
            raise
        engine.configure(configure(spec.limits))
        return "; ".join(map(str, changed))

    async def _hold(self, engine: EngineProcess, adapters: Sequence[AdapterSpec], held: set[str]) -> None:
        """Load and drop adapters until it holds these, where it holds those of `held`. Raises EngineError."""
        wanted = {adapter.key: adapter for adapter in adapters}
        for key in wanted.keys() - held:
            await engine.load_adapter(adapter_source(wanted[key]))
            held.add(key)
        for key in held - wanted.keys():
            await engine.drop_adapter(key)
            held.discard(key)

    async def abandon(self) -> None:
        """End an engine that is not up yet; whoever waits for it gets EngineDied."""
        self._conversions.abandon()
        if self.engine is not None:
            await self.engine.kill()


@contextmanager
def _nothing_else(model: str) -> Iterator[None]:
    """Only EngineError comes out: whoever brings an engine up tries again, which nobody would after a fault of ours."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        logger.exception("bringing up an engine failed unexpectedly", extra={"model": model})
        raise EngineDied(
            f"{model}: unexpected {type(error).__name__}: {error}", hint="The runner's log has more."
        ) from None
