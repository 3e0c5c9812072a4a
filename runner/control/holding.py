"""An engine's place in memory, and what counts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runner.control.engine_process import EngineProcess
from runner.machine import resident_bytes
from runner.plan.forecast import ENGINE_BYTES, least
from runner.plan.spec import ModelSpec

_STAY_LOADS: Final = 2.0
_STAY_MOST: Final = 10.0
"""An engine stays for as long as it took to load, so many times over, and no longer than so many seconds."""


@dataclass(eq=False, slots=True)
class Holding:
    """`engine` is None until there is a process. `budget` is what it was told to keep to, in bytes, `since` when it had
    loaded, by `time.monotonic`."""

    spec: ModelSpec
    engine: EngineProcess | None = None
    leaving: bool = False
    budget: int = 0
    since: float = 0.0

    @property
    def bytes(self) -> int:
        """What counts of it now."""
        stats = self.engine.stats if self.engine is not None else None
        pid = self.engine.pid if self.engine is not None else None
        held = max(least(self.spec), 0 if stats is None else stats.reserved_bytes) + ENGINE_BYTES
        return max(held, resident_bytes(pid) if pid is not None else 0)

    @property
    def keeps_to_budget(self) -> bool:
        """Whether the engine says so, or is gone."""
        engine = self.engine
        if engine is None or not engine.alive:
            return True
        return engine.stats is not None and engine.stats.budget_bytes <= self.budget

    @property
    def load_seconds(self) -> float:
        """What it takes to load it again."""
        loaded = self.engine.loaded if self.engine is not None else None
        return max(0.01, loaded.seconds) if loaded is not None else 0.01

    @property
    def stay(self) -> float:
        """Seconds that it stays after it has loaded, though others wait."""
        return min(_STAY_LOADS * self.load_seconds, _STAY_MOST)
