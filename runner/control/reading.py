"""Reads the manifest: what it says, and what it comes to once all that it names is on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.conditions import Wanted
from runner.control.fetching import Fetching
from runner.control.portion import Portion
from runner.manifest.drift import NO_CHANGES, Changes
from runner.plan.planner import Observed
from runner.plan.spec import Desired

_REST_AFTER: Final = 10.0
"""Seconds after a pass until the compiler's process rests: edits come in bursts."""


class Reading:
    """`name` is the runner's; `wanted` learns which models cannot be had."""

    def __init__(self, compiler: Compiler, name: str, fetch: Fetching, wanted: Wanted) -> None:
        self._compiler = compiler
        self._name = name
        self._fetch = fetch
        self._wanted = wanted
        self._rest: asyncio.TimerHandle | None = None

    def prepare(self) -> None:
        """Something is to be read soon: have what it needs started."""
        asyncio.get_running_loop().run_in_executor(None, self._compiler.start)

    async def compile(self, paths: tuple[Path, ...], changes: Changes = NO_CHANGES, *, frozen: bool) -> Compiled:
        """What `paths` say with `changes` over it; `frozen`: as their lock has it. Raises RunnerError."""
        return await asyncio.to_thread(self._compiler.compile, paths, self._name, frozen=frozen, changes=changes)

    def let_rest(self) -> None:
        """Nothing is to be read for now: the compiler's process rests in a while."""
        if self._rest is not None:
            self._rest.cancel()
        loop = asyncio.get_running_loop()
        self._rest = loop.call_later(_REST_AFTER, loop.run_in_executor, None, self._compiler.stop)

    async def desired(
        self, compiled: Compiled, portion: Portion, observe: Callable[[], Observed], *, frozen: bool
    ) -> Desired:
        """The desired state, downloading what is missing. Raises ManifestError."""
        fetched: set[tuple[str, str]] = set()
        while missing := portion.missing(compiled, observe()):
            coming = [download for download in missing if (download.repo, download.revision) not in fetched]
            if not coming:
                break  # it is not whole on the hub either
            fetched |= {(download.repo, download.revision) for download in coming}
            await self._fetch(compiled, coming)
            compiled = await self.compile(compiled.paths, compiled.changes, frozen=frozen)
        if compiled.provisional is not None and not missing:
            return compiled.provisional  # what is not there is left out
        error = compiled.error()
        if error is not None:
            self._wanted.wrong(compiled.models, error.diagnostics)
            raise error
        assert compiled.desired is not None, "a manifest is either wrong or resolved"
        return compiled.desired
