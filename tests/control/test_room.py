"""Arithmetic of who may come to what."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from runner.control.backstop import Backstop
from runner.control.room import Crowded, Room
from runner.control.state_folder import StateFolder
from runner.inspect.memory import ModelMemory
from runner.plan.forecast import ENGINE_BYTES
from runner.plan.spec import ModelSpec
from runner.protocol import Loaded

MIB = 2**20
LOADED = Loaded(weights_bytes=1, active_bytes=1, seconds=0.01, max_context=8, device="none")


def spec(name: str, weights: int, rows: int = 4, **fields: Any) -> ModelSpec:
    """`weights` MiB, and rows that take 10 MiB each."""
    memory = ModelMemory(weights=weights * MIB, kv_per_token=1, kv_row=10 * MIB, rows=rows, context=256, first=MIB)
    return ModelSpec(name, name, Path(name), name, weights * MIB, memory=memory, **fields)


@dataclass
class Alone:
    """A tenant without an engine."""

    spec: ModelSpec
    engine: Any = None
    busy: bool = False
    used_at: float = 0.0
    reasons: list[str] = field(default_factory=list)

    def unload(self, reason: str) -> None:
        self.reasons.append(reason)


def room(limit: int, *tenants: Alone, patience: float = 0.3) -> Room:
    backstop = Backstop(StateFolder(Path(), "none", create=False), wanted=False)
    made = Room(lambda: list(tenants), patience, lambda *_, **__: None, backstop)
    made.limit = limit
    return made


async def test_what_is_left_is_shared_by_what_each_can_come_to() -> None:
    one, other = spec("one", 100, rows=8), spec("other", 100, rows=2)
    made = room(2 * ENGINE_BYTES + (202 + 50) * MIB)
    first = await made.enter(Alone(one), one)
    second = await made.enter(Alone(other), other)
    shared = made._budgets(None)
    grows = [shared[id(s)] - 101 * MIB for s in (one, other)]
    assert first.budget >= shared[id(one)], "it was alone then"
    assert second.budget == shared[id(other)]
    assert sum(grows) <= 50 * MIB
    assert grows[0] > 3 * grows[1] > 0


@dataclass(eq=False)
class Up:
    """An engine that has loaded, and what it was told to keep to."""

    budgets: list[int] = field(default_factory=list)
    alive: bool = True
    loaded: Loaded = LOADED
    loaded_at: float = field(default_factory=time.time)
    stats: None = None
    pid: None = None

    def budget(self, budget: int) -> None:
        self.budgets.append(budget)

    async def gone(self) -> None:
        await asyncio.Event().wait()


async def test_one_that_loads_while_another_leaves_gets_what_that_one_had() -> None:
    one, other = spec("one", 100), spec("other", 100)
    made = room(2 * ENGINE_BYTES + (202 + 20) * MIB)
    first = await made.enter(Alone(one), one)
    second = await made.enter(Alone(other), other)
    small = second.budget
    made.leave(first)  # the second still loads, and cannot be told anything
    engine: Any = Up()
    made.watch(second, engine)
    assert engine.budgets == [second.budget]
    assert second.budget > small


async def test_one_that_was_edited_in_place_gets_what_it_can_come_to_now() -> None:
    tenant = Alone(spec("one", 100, rows=2), engine=Up())
    made = room(10_000 * MIB, tenant)
    place = await made.enter(tenant, tenant.spec)
    made.watch(place, tenant.engine)
    small = place.budget
    tenant.spec = spec("one", 100, rows=32, load="on_demand")
    made.share()
    assert tenant.engine.budgets == [place.budget]
    assert place.budget > small
    assert place.spec is tenant.spec


async def test_a_clock_that_is_set_back_keeps_nobody_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = Alone(spec("lazy", 100, load="on_demand"), engine=Up())
    made = room(ENGINE_BYTES + 150 * MIB, lazy, patience=60)
    made.watch(await made.enter(lazy, lazy.spec), lazy.engine)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    coming = Alone(spec("coming", 100, load="on_demand"))
    entering = asyncio.create_task(made.enter(coming, coming.spec))
    async with asyncio.timeout(15):
        while not lazy.reasons:
            await asyncio.sleep(0.01)
    entering.cancel()


async def test_a_limit_of_its_own_holds_and_unknown_lengths_get_what_there_is() -> None:
    small = spec("small", 100, memory_limit_bytes=105 * MIB)
    made = room(10_000 * MIB)
    assert (await made.enter(Alone(small), small)).budget == 105 * MIB
    open_end = spec("open", 100)
    open_end = replace(open_end, memory=open_end.memory._replace(context=0))
    alone = room(10_000 * MIB)
    assert (await alone.enter(Alone(open_end), open_end)).budget > 9_000 * MIB


async def test_without_a_limit_nothing_is_budgeted() -> None:
    one = spec("one", 100)
    assert (await room(0).enter(Alone(one), one)).budget == 0


async def test_one_that_is_loaded_from_the_start_goes_ahead() -> None:
    one, other = spec("one", 100), spec("other", 100)
    made = room(ENGINE_BYTES + 150 * MIB)
    await made.enter(Alone(one), one)
    await made.enter(Alone(other), other)


async def test_one_on_demand_is_told_at_once_that_it_never_fits() -> None:
    one, lazy = spec("one", 100), spec("lazy", 100, load="on_demand")
    made = room(ENGINE_BYTES + 150 * MIB, patience=60)
    await made.enter(Alone(one), one)
    with pytest.raises(Crowded, match="no room for lazy: it needs"):
        await made.enter(Alone(lazy), lazy)


async def test_who_waits_gets_the_place_that_is_given_back() -> None:
    one, lazy = spec("one", 100, load="on_demand"), spec("lazy", 100, load="on_demand")
    made = room(ENGINE_BYTES + 150 * MIB)
    place = await made.enter(Alone(one), one)
    with pytest.raises(Crowded):
        await made.enter(Alone(lazy), lazy)
    made.leave(place)
    assert (await made.enter(Alone(lazy), lazy)).spec is lazy
