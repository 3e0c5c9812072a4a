"""Who may be in memory: what engines hold, who has to wait for room, and who gives way.

What counts of an engine is the most of what was planned for it, what it has promised to the requests it works on, and
what its process really takes. Those that load when they are asked for (`load: on_demand`) give way to others while
nobody uses them: of the lowest priority first, and then the one that is least missed, which is cheap to load again and
was used long ago. One that has just been loaded stays for a moment, so that many models with room for few take turns
instead of thrashing; one that is never idle finishes what it works on and then gives way. Nothing that works is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from runner.control.backstop import Backstop
from runner.control.budgets import share_out
from runner.control.engine_process import EngineProcess
from runner.control.holding import Holding
from runner.errors import EngineDied
from runner.machine import available_memory
from runner.plan.forecast import with_process
from runner.plan.spec import ModelSpec

_LOOK: Final = 0.1
"""Seconds between two looks while somebody waits: processes grow and shrink without saying so."""

_PATIENCE: Final = 1.0
"""Seconds that a claim waits for somebody to fall idle before one that is busy is asked to finish."""

_ANSWER: Final = 1.0
"""Seconds that engines get to say that they keep to a smaller budget."""


class Crowded(EngineDied):
    """There was no room for a model in time; later there may be."""


class Tenant(Protocol):
    """A deployment, as far as its place in memory is concerned."""

    @property
    def spec(self) -> ModelSpec:
        """What it serves."""
        ...

    @property
    def engine(self) -> EngineProcess | None:
        """The engine that takes requests."""
        ...

    @property
    def busy(self) -> bool:
        """Whether requests are in its engine, or about to be."""
        ...

    @property
    def used_at(self) -> float:
        """When a request last ended, by `time.monotonic`."""
        ...

    def unload(self, reason: str) -> None:
        """End the engine once it has finished what it works on; the next request loads it again."""
        ...


@dataclass(eq=False, slots=True)
class _Claim:
    tenant: Tenant
    spec: ModelSpec
    number: int
    began: float = field(default_factory=time.monotonic)

    @property
    def rank(self) -> tuple[int, int]:
        return (-self.spec.priority, self.number)


class Room:
    """The memory that engines share. `limit` is in bytes, 0 where the manifest declares none; `patience` in seconds is
    how long a model may wait for room. `tenants` are the deployments, `emit` tells what happens, and `backstop` is what
    holds engines that do not keep to what they were told."""

    def __init__(
        self,
        tenants: Callable[[], Iterable[Tenant]],
        patience: float,
        emit: Callable[..., None],
        backstop: Backstop,
    ) -> None:
        self.limit = 0
        self.backstop = backstop
        self._tenants = tenants
        self._patience = patience
        self._emit = emit
        self._held: list[Holding] = []
        self._claims: list[_Claim] = []
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._watches: set[asyncio.Task[None]] = set()

    async def enter(self, tenant: Tenant, spec: ModelSpec) -> Holding:
        """A place for an engine of `spec`; waits for it, and has others give way.

        A model that is loaded from the start has been planned to fit, so it goes ahead once all that can give way have.
        Raises Crowded: there is none, or none in time.
        """
        claim = _Claim(tenant, spec, next(self._numbers))
        self._claims.append(claim)
        self._claims.sort(key=lambda other: other.rank)
        try:
            async with asyncio.timeout(self._patience):
                while self._claims[0] is not claim or not await self._has_room(claim):
                    await self._change()
        except TimeoutError:
            if spec.load == "on_demand":
                raise Crowded(self._why(spec), hint="Others are at work, or are loading.") from None
        finally:
            self._claims.remove(claim)
            self._changed.set()
        if (needed := with_process(spec)) > (left := available_memory()):
            self._emit("memory_short", target=f"models.{spec.name}", needed=needed, available=left)
        holding = Holding(spec, budget=self._budgets(spec).get(id(spec), 0))
        self._held.append(holding)
        return holding

    @property
    def engines(self) -> list[EngineProcess]:
        """All that take requests, or finish those that they have: also of deployments that are gone."""
        return [holding.engine for holding in self._held if holding.engine is not None and holding.engine.alive]

    def note(self, engine: EngineProcess, spec: ModelSpec) -> None:
        """An engine that is there already has its place."""
        self._held.append(holding := Holding(spec))
        self.watch(holding, engine)

    def watch(self, holding: Holding, engine: EngineProcess) -> None:
        """An engine has loaded; its place is given back when its process ends."""
        holding.engine, holding.since = engine, time.monotonic()
        self.share()  # others may have come or gone since it was started

        async def until_gone() -> None:
            await engine.gone()
            self.leave(holding)

        task = asyncio.create_task(until_gone())
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    def leave(self, holding: Holding) -> None:
        """The place is free."""
        with contextlib.suppress(ValueError):
            self._held.remove(holding)
        self._changed.set()
        self.share()

    def leaving(self, engine: EngineProcess) -> None:
        """An engine has been told to end."""
        for holding in self._held:
            if holding.engine is engine:
                holding.leaving = True

    def touch(self) -> None:
        """Somebody fell idle."""
        self._changed.set()

    # ------------------------------------------------------------- room for one more

    async def _change(self) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._changed.wait()

    async def _has_room(self, claim: _Claim) -> bool:
        if self._short(claim.spec) <= 0:
            return True
        await self._squeeze(claim.spec)
        short = self._short(claim.spec) - sum(holding.bytes for holding in self._held if holding.leaving)
        if short <= 0:
            # Those that are on their way out make room; but what the machine lacks may never come.
            return self._short(claim.spec) <= 0
        candidates = self._candidates(claim)
        if short > sum(holding.bytes for _, holding in candidates):
            if claim.spec.load == "on_demand" and self._never(claim):
                raise Crowded(self._why(claim.spec), hint="Raise memory.limit, or quantise the model.")
            return claim.spec.load != "on_demand"
        for tenant, holding in self._first(candidates, short, claim):
            self._emit("evicted", target=f"models.{tenant.spec.name}", reason=f"models.{claim.spec.name} needs room")
            holding.leaving = True
            tenant.unload("makes room")
        return False

    def _never(self, claim: _Claim) -> bool:
        """Whether it would not fit if all that can ever give way had."""
        fixed = [h for h in self._held if h.spec.load != "on_demand"]
        return with_process(claim.spec) + sum(holding.bytes for holding in fixed) > self._usable

    def _candidates(self, claim: _Claim) -> list[tuple[Tenant, Holding]]:
        """Who may ever give way to a claim, those that are least missed first."""
        now = time.monotonic()
        places = {id(holding.engine): holding for holding in self._held if holding.engine and not holding.leaving}
        found = [
            (tenant, places[id(tenant.engine)])
            for tenant in self._tenants()
            if tenant is not claim.tenant and tenant.spec.load == "on_demand" and id(tenant.engine) in places
        ]
        return sorted(found, key=lambda one: (one[0].spec.priority, one[1].load_seconds / (now - one[0].used_at + 1)))

    def _first(
        self, candidates: list[tuple[Tenant, Holding]], short: int, claim: _Claim
    ) -> list[tuple[Tenant, Holding]]:
        """Those that give way now: as many as are enough, of those that are idle, else of those that are busy too once
        the claim has waited for a while; nobody who came just now, and nobody at all where they are not enough."""
        now = time.monotonic()  # not by the clock on the wall, which may be set back
        patient = now - claim.began < _PATIENCE
        stayed = [one for one in candidates if now - one[1].since >= one[1].stay]
        idle = [one for one in stayed if not one[0].busy]
        chosen: list[tuple[Tenant, Holding]] = []
        for one in [*idle, *([] if patient else [one for one in stayed if one not in idle])]:
            if short <= 0:
                break
            chosen.append(one)
            short -= one[1].bytes
        return chosen if short <= 0 else []

    @property
    def _usable(self) -> int:
        return self.limit or 1 << 62

    def _short(self, spec: ModelSpec) -> int:
        """Bytes that are lacking for an engine of `spec`, by the manifest's limit and by what the machine has now."""
        needed = with_process(spec)
        return max(needed + sum(holding.bytes for holding in self._held) - self._usable, needed - available_memory())

    def _why(self, spec: ModelSpec) -> str:
        held = ", ".join(f"{holding.spec.name} {holding.bytes:,}" for holding in self._held) or "nothing"
        limit = f"{self.limit:,} may be used" if self.limit else f"the machine has {available_memory():,} left"
        return f"no room for {spec.name}: it needs {with_process(spec):,} bytes, held are {held}, and {limit}"

    # ------------------------------------------------------------- what each may come to

    def share(self) -> None:
        """Tell every engine what it may come to now: what it needs at least, and its part of what is left. To be called
        when another `limit`, or another spec of what runs, is in effect."""
        served = {id(tenant.engine): tenant.spec for tenant in self._tenants() if tenant.engine is not None}
        for holding in self._held:
            holding.spec = served.get(id(holding.engine), holding.spec)
        budgets = self._budgets(None)
        for holding in self._held:
            self._tell(holding, budgets.get(id(holding.spec), 0))

    async def _squeeze(self, coming: ModelSpec) -> None:
        """Have engines give back what they hold for later, such as prefixes, before one more comes."""
        if not self.limit:
            return
        budgets = self._budgets(coming)
        told = [h for h in self._held if self._tell(h, budgets.get(id(h.spec), 0))]
        until = time.monotonic() + _ANSWER
        while time.monotonic() < until and not all(holding.keeps_to_budget for holding in told):
            await self._change()

    def _tell(self, holding: Holding, budget: int) -> bool:
        engine = holding.engine
        if holding.leaving or budget == holding.budget or engine is None or not engine.alive or engine.loaded is None:
            return False
        holding.budget = budget
        engine.budget(budget)
        return True

    def _budgets(self, coming: ModelSpec | None) -> dict[int, int]:
        """Bytes by the spec's id, for all that stay and the one that comes. Empty without a declared limit."""
        specs = [holding.spec for holding in self._held if not holding.leaving]
        return share_out(self.limit, [*specs, coming] if coming is not None else specs)
