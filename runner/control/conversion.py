"""Quantised copies of models, made once and kept by what they were made of.

A copy's folder is named by the source's digest, the settings, and the version of MLX that made it. It is written
beside, by a process of its own (`runner.engine.convert`), and gets its name when it is complete and the source is still
what it was; so a folder that has its name can be used as it is. One is made at a time on a machine: each holds a
gigabyte or two while it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from runner.control.copies import CONVERTING, PARTIAL, hold, note, place_of, sweep_alone, try_lock
from runner.control.sources import Sources
from runner.errors import EngineDied, EngineLoadError, SourceChanged
from runner.plan.spec import ModelSpec
from runner.processes import python_module

Emit = Callable[..., None]

_RETRY: Final = 0.1
"""Seconds between attempts to become the one that makes a copy."""


class Conversions:
    """The copies in one cache folder, as one deployment needs them. `stage` is what is being done, "" when nothing is;
    `log` is where the process writes whatever else it has to say."""

    def __init__(self, folder: Path, sources: Sources, log: Callable[[str], Path], emit: Emit) -> None:
        self.stage = ""
        self._folder = folder
        self._sources = sources
        self._log = log
        self._emit = emit
        self._work: asyncio.Task[None] | None = None
        self._abandoned = False

    @contextlib.asynccontextmanager
    async def folder_for(self, spec: ModelSpec) -> AsyncIterator[Path]:
        """What an engine of `spec` loads; made first where it has to be, and not removed until the end of the block.

        Raises EngineLoadError (it cannot be made), SourceChanged, and EngineDied where it is abandoned. Cancelling ends
        it; either way nothing is left behind.
        """
        if spec.quantization is None:
            yield spec.path
            return
        place = place_of(self._folder, spec)
        while (held := hold(place)) is None:
            await self._made(spec, place)
        try:
            yield place
        finally:
            os.close(held)

    async def _made(self, spec: ModelSpec, place: Path) -> None:
        self.stage, self._abandoned = "converting", False
        self._work = asyncio.create_task(self._make(spec, place))
        try:
            await self._work
        except asyncio.CancelledError:
            if self._abandoned:
                raise EngineDied(f"the quantised copy of {spec.name} was given up") from None
            raise
        except OSError as error:
            raise EngineLoadError(
                f"{spec.name}: the quantised copy could not be written: {error}",
                hint=f"It is kept in {self._folder}; MLX_RUN_CACHE_DIR chooses another place.",
            ) from None
        finally:
            self.stage, self._work = "", None

    def abandon(self) -> None:
        """End what is being made; whoever waits for it gets EngineDied."""
        if self._work is not None:
            self._abandoned = True
            self._work.cancel()

    async def _make(self, spec: ModelSpec, place: Path) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _alone(self._folder / CONVERTING):
            if not self._is_open(spec, place):
                return
            started = time.monotonic()
            await self._write(spec, place)
            self._emit("converted", target=f"models.{spec.name}", seconds=round(time.monotonic() - started, 3))

    async def _write(self, spec: ModelSpec, place: Path) -> None:
        beside = place.with_name(f"{place.name}{PARTIAL}")
        settings = beside.with_suffix(f"{PARTIAL}.json")
        try:
            settings.write_text(json.dumps(_settings(spec, beside)), encoding="utf-8")
            await _run(spec, settings, self._log(spec.name), _Progress(self, spec.name, self._emit))
            changed = [it for it in await self._sources.changed([spec]) if it.path == f"models.{spec.name}.source"]
            if changed:
                raise SourceChanged("files changed while they were quantised:\n" + "\n".join(map(str, changed)))
            note(beside, spec.source)
            await asyncio.to_thread(_sync, beside)
            beside.rename(place)
        finally:
            settings.unlink(missing_ok=True)
            shutil.rmtree(beside, ignore_errors=True)

    def _is_open(self, spec: ModelSpec, place: Path) -> bool:
        """Whether the copy is still to be made; tidies up for it. Raises EngineLoadError where it has no room."""
        if place.is_dir():  # somebody else was at it
            return False
        sweep_alone(self._folder)  # nobody else is at it, as long as we hold the lock
        self._require_space(spec)
        return True

    def _require_space(self, spec: ModelSpec) -> None:
        free, needed = shutil.disk_usage(self._folder).free, spec.weights_bytes
        if free < needed:
            raise EngineLoadError(
                f"{spec.name}: its quantised copy takes {needed:,} bytes, and {self._folder} has {free:,} left",
                hint="Make room there, or choose another place with MLX_RUN_CACHE_DIR.",
            )


class _Progress:
    """Tells how far a copy is: in the stage at once, as an event at each quarter."""

    def __init__(self, conversions: Conversions, model: str, emit: Emit) -> None:
        self._conversions = conversions
        self._model = model
        self._emit = emit
        self._told = -1
        self(0, 1)

    def __call__(self, done: int, of: int) -> None:
        percent = 100 * done // max(1, of)
        self._conversions.stage = f"converting, {percent} %"
        if percent // 25 > self._told:
            self._told = percent // 25
            self._emit("converting", target=f"models.{self._model}", percent=percent)


def _settings(spec: ModelSpec, target: Path) -> dict[str, Any]:
    wanted = spec.quantization
    assert wanted is not None, "only what is to be quantised is converted"
    return {
        "source": str(spec.path),
        "target": str(target),
        "bits": wanted.bits,
        "group_size": wanted.group_size,
        "mode": wanted.mode,
        "layers": wanted.layers,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code,
    }


async def _run(spec: ModelSpec, settings: Path, log: Path, progress: _Progress) -> None:
    with log.open("ab") as stream:
        process = await asyncio.create_subprocess_exec(
            *python_module("runner.engine.convert", str(settings)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stream,
            start_new_session=True,
        )
    assert process.stdout is not None, "it is a pipe"
    failure: dict[str, str] = {}
    try:
        async for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                failure = message
            else:
                progress(message["done"], message["of"])
        code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if code:
        reason = failure.get("error") or f"the process ended with code {code}"
        hint = failure.get("hint") or f"Its output: `mlx-run logs {spec.name}`."
        raise EngineLoadError(f"{spec.name}: the source could not be quantised: {reason}", hint=hint)


@contextlib.asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[None]:
    """Hold a lock that the kernel drops with its process."""
    with path.open("a+b") as file:
        while not try_lock(file):  # noqa: ASYNC110 - the lock may be of another process
            await asyncio.sleep(_RETRY)
        yield


def _sync(folder: Path) -> None:
    """Have the disk hold the files before their folder gets its name."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
