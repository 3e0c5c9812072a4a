"""What an earlier generation was, to be made live again or held."""

from __future__ import annotations

from pathlib import Path

from runner.control.compiled import Compiled
from runner.control.events import EventLog
from runner.control.ledger import Ledger
from runner.control.live import Live
from runner.errors import RunnerError
from runner.plan.spec import Desired


class Restoring:
    """Recalls generations from `ledger`, and sees that the files they were made of are still what they were."""

    def __init__(self, live: Live, ledger: Ledger, events: EventLog) -> None:
        self._live = live
        self._ledger = ledger
        self._events = events

    async def target(self, number: int | None) -> tuple[Desired, int]:
        """What generation `number` was, or the one before the current, and its number. Raises RunnerError where it
        cannot be had again."""
        target = self._ledger.target(number)
        desired = self._ledger.recall(target.number, _keys(self._live.committed))
        await self._require_sources(desired, target.number)
        return desired, target.number

    async def held(self, compiled: Compiled, manifest: Path) -> tuple[Desired, int]:
        """What a rollback made so, and the generation that it went back to."""
        current = self._ledger.current
        assert current is not None, "what holds is current"
        self._events.emit("held", generation=current.number, restores=current.restores)
        if self._live.committed is not None:
            return self._live.committed, current.restores
        desired = self._ledger.recall(current.number, _keys(compiled.desired))
        try:
            await self._require_sources(desired, current.restores)
        except RunnerError as error:
            error.hint = f"{error.hint} Or edit {manifest.name}: any change of it is applied instead."
            raise
        return desired, current.restores

    async def _require_sources(self, desired: Desired, number: int) -> None:
        """Raises RunnerError where a generation's models or adapters are not what they were."""
        changed = await self._live.sources.changed(desired.models)
        if changed:
            raise RunnerError(
                f"generation {number} cannot be had again:\n" + "\n".join(map(str, changed)),
                hint="Bring those files back as they were.",
            )


def _keys(desired: Desired | None) -> list[str]:
    """The API keys of a desired state."""
    return [key for listener in desired.listeners for key in listener.api_keys] if desired else []
