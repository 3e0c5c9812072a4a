"""Engines that a killed runner left behind: those that serve what is wanted are taken over, the rest is told to end.

An engine waits `orphan_grace` seconds for a runner, so this is for one that is started again at once, as service
managers do. What an engine holds is asked of the engine, never taken from a file.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import msgspec

from runner.control.deployment import Deployment
from runner.control.engine_spec import configure
from runner.control.live import Live
from runner.errors import EngineDied
from runner.plan.spec import AdapterSpec, Desired, ModelSpec
from runner.protocol import EngineSpec

logger = logging.getLogger(__name__)


async def adopt_engines(live: Live, desired: Desired) -> None:
    """Give `live` a deployment for each engine that is up and serves a model of `desired`, as that engine has it now.

    The planner then sees them as running, and plans only what is different.
    """
    for engine_id in live.folder.engines():
        try:
            spec = msgspec.json.decode(live.folder.engine_spec(engine_id).read_bytes(), type=EngineSpec)
        except (OSError, msgspec.DecodeError):
            live.folder.forget_engine(engine_id)
            continue
        wanted = desired.model(spec.model)
        serves = wanted is not None and wanted.process_digest == spec.digest and wanted.name not in live.deployments
        deployment = Deployment(
            wanted if serves and wanted else _unwanted(spec), live.folder, live.options, live.emit, live.room
        )
        try:
            engine = await deployment.starting.adopt(spec, engine_id)
        except (OSError, EngineDied) as error:
            logger.info("engine not adopted", extra={"model": spec.model, "engine": engine_id, "error": str(error)})
            live.folder.forget_engine(engine_id)
            continue
        if not serves or wanted is None:
            live.in_background(engine.drain(0.0))
            continue
        deployment.switch(_as_it_is(wanted, engine.hello.adapters if engine.hello else []), engine)
        engine.configure(configure(wanted.limits))  # it does not say which it keeps to, and they are not in its digest
        live.deployments[spec.model] = deployment
        live.emit("engine_adopted", target=f"models.{spec.model}", pid=engine.pid)


def _as_it_is(wanted: ModelSpec, keys: list[str]) -> ModelSpec:
    """`wanted` with the adapters that the engine really holds; one that is not wanted any more goes by its key."""
    held = [adapter for adapter in wanted.adapters if adapter.key in keys]
    known = {adapter.key for adapter in held}
    held += [AdapterSpec(name=key, path=Path(), digest=key) for key in keys if key not in known]
    return dataclasses.replace(wanted, adapters=tuple(held))


def _unwanted(spec: EngineSpec) -> ModelSpec:
    return ModelSpec(spec.model, spec.path, Path(spec.path), spec.digest, 0)
