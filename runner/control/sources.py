"""Compares the files of models and adapters with what was planned, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from runner.plan.digests import DigestCache
from runner.plan.spec import AdapterSpec, ModelSpec
from runner.plan.verify import Changed, changed_adapter, changed_sources


class Sources:
    """Remembers what it read by file version, so that looking again costs a `stat` a file."""

    def __init__(self) -> None:
        self._cache = DigestCache()
        self._lock = threading.Lock()

    async def changed(self, models: Iterable[ModelSpec]) -> list[Changed]:
        """What is not as it was when these were resolved."""

        def look() -> list[Changed]:
            with self._lock:
                return [found for spec in models for found in changed_sources(spec, self._cache)]

        return await asyncio.to_thread(look)

    async def changed_adapters(self, model: str, adapters: Iterable[AdapterSpec]) -> list[Changed]:
        """The same of some adapters of a model."""

        def look() -> list[Changed]:
            with self._lock:
                return [found for adapter in adapters for found in changed_adapter(model, adapter, self._cache)]

        return await asyncio.to_thread(look)
