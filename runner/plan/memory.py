"""Whether the models fit, by arithmetic on file headers, before anything is started.

An error is what can never work: weights, adapters, drafts and the first step of one request. What only every row at
its longest would take is a warning: the engine lets rows wait (`runner.engine.memory`), and the message says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from runner.inspect.memory import ModelMemory
from runner.machine import Machine
from runner.manifest.load import Loaded
from runner.manifest.models import Memory
from runner.manifest.tree import KeyPath, Problem
from runner.manifest.values import format_size
from runner.plan.forecast import ENGINE_BYTES
from runner.plan.subject import Subject

_FEWER: Final = "quantise, or serve fewer models"
_ONE_TAKES: Final = f"its engine takes {format_size(ENGINE_BYTES)}"


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes. `usable` is what models may be planned into: `limit` - `reserve`; `declared` is 0 without a limit."""

    limit: int
    reserve: int
    machine: int
    explained: str
    declared: int

    @property
    def usable(self) -> int:
        return max(0, self.limit - self.reserve)


def memory_budget(memory: Memory | None, machine: Machine) -> MemoryBudget:
    """What the manifest's `memory` comes to on a machine. What it does not have is not used, whatever the limit is; but
    a GPU may have memory of its own, which is not what is known of the machine."""
    whole = machine.memory
    asked = whole if memory is None or memory.limit is None else memory.limit.of(whole)
    limit = min(asked, whole) if machine.float32 else asked
    reserve = 0 if memory is None else memory.reserve.of(whole)
    declared = memory is not None and (memory.limit is not None or reserve > 0)
    parts = format_size(limit) + (" (all of the machine)" if limit == whole else "")
    if memory is not None and memory.limit is not None and memory.limit.percent is not None:
        parts = f"{format_size(limit)} ({memory.limit} of {format_size(whole)})"
    if reserve:
        parts += f" - {format_size(reserve)} reserve = {format_size(max(0, limit - reserve))}"
    return MemoryBudget(limit, reserve, whole, parts, max(1, limit - reserve) if declared else 0)


def check_memory(loaded: Loaded, models: Sequence[Subject], machine: Machine) -> list[Problem]:
    """What does not fit: a model into its own `memory_limit`, or all of them into `memory`."""
    budget = memory_budget(loaded.manifest.memory, machine)
    found = list(_more_than_there_is(loaded, machine))
    for it in models:
        if it.spec.memory_limit_bytes:
            found += _within_its_own(it)
    return found + list(_all_together(loaded, models, budget))


def _more_than_there_is(loaded: Loaded, machine: Machine) -> Iterator[Problem]:
    memory = loaded.manifest.memory
    if memory is not None and memory.limit is not None and memory.limit.of(machine.memory) > machine.memory:
        there = format_size(machine.memory)
        message = f"is {format_size(memory.limit.of(machine.memory))}, and the machine has {there}"
        hint = "give a share of the machine, such as 75%"
        yield Problem("W704", ("memory", "limit"), message, hint)


def _within_its_own(it: Subject) -> Iterator[Problem]:
    memory, limit = it.spec.memory, it.spec.memory_limit_bytes
    path = (*it.path, "memory_limit")
    if memory.least > limit:
        terms = _terms(memory)
        total = f"make {format_size(memory.least)}" if " + " in terms else "are needed"
        message = f"is {format_size(limit)}, but {terms} {total}"
        hint = f"give {_rounded_up(memory.least)} or more, or use a smaller or quantised model"
        yield Problem("E701", path, message, hint)
        return
    yield from _rows(it, memory, limit)
    room = limit - memory.held - memory.prefill
    if it.says("kv_cache", "prefix_cache") and memory.prefix_cache > max(0, room):
        message = f"is {format_size(memory.prefix_cache)}, but memory_limit leaves {format_size(max(0, room))} for it "
        message += "and for all requests"
        hint = "requests take its room: raise memory_limit, or lower it"
        yield Problem("W703", it.at("kv_cache", "prefix_cache"), message, hint)


def _rows(it: Subject, memory: ModelMemory, limit: int) -> Iterator[Problem]:
    """What has to wait, or is refused, under the model's own limit."""
    path = (*it.path, "memory_limit")
    if not memory.context:
        return
    at_once = memory.rows_within(limit)
    if at_once == 0:
        longest = memory.context_within(limit)
        message = (
            f"has room for one request of {longest} tokens at most, where the context has {memory.context}: "
            "longer ones are refused"
        )
        yield Problem("W701", path, message, f"give kv_cache.max_context: {longest}, or raise it")
    elif at_once < memory.rows:
        message = (
            f"has room for {at_once} requests of {memory.context} tokens at once, and max_rows is {memory.rows}: "
            "others wait in the queue"
        )
        needed = memory.held + memory.prefill + memory.kv_max
        yield Problem("W701", path, message, f"all at once need {_rounded_up(needed)}; shorter ones need less")


def _all_together(loaded: Loaded, models: Sequence[Subject], budget: MemoryBudget) -> Iterator[Problem]:
    least = _at_once(models, lambda it: it.spec.memory.least)
    if sum(least.values()) > budget.usable:
        message = (
            f"the models need {format_size(sum(least.values()))} ({_sum(least)}) for their weights and one request "
            f"each, and may use {budget.explained}"
        )
        yield Problem("E702", _place(loaded), message, f"raise memory.limit, {_FEWER}" if _limited(loaded) else _FEWER)
        return
    together = sum(least.values()) + len(least) * ENGINE_BYTES
    if budget.declared and together > budget.usable:
        yield _without_processes(loaded, least, budget, together)
        return
    most = _at_once(models, _bounded)
    processes = len(most) * ENGINE_BYTES if budget.declared else 0
    if sum(most.values()) + processes > budget.usable:
        free = [it for it in models if not it.spec.memory_limit_bytes]
        message = (
            f"with every row at its longest the models take {format_size(sum(most.values()))} ({_sum(most)})"
            f"{f', their processes {format_size(processes)}' if processes else ''}, and may use {budget.explained}"
        )
        if free:
            hint = f"lower kv_cache.max_context or batching.max_rows of {free[0].spec.name}, or give it a memory_limit"
        else:
            hint = "lower the memory_limit of some"
        yield Problem("W702", _place(loaded), message, hint)


def _without_processes(loaded: Loaded, least: dict[str, int], budget: MemoryBudget, together: int) -> Problem:
    """The models fit, and the processes that serve them do not."""
    count = len(least)
    engines = f"{count} engines take {format_size(ENGINE_BYTES)} each" if count > 1 else _ONE_TAKES
    message = (
        f"the models need {format_size(sum(least.values()))} ({_sum(least)}) for their weights and one request each, "
        f"and {engines} beside that: {format_size(together)} together, where they may use {budget.explained}"
    )
    more = (
        f"give memory.limit {_rounded_up(together + budget.reserve)} or more"
        if _limited(loaded)
        else f"lower memory.reserve, {_FEWER}"
    )
    return Problem("E703", _place(loaded), message, more)


def _at_once(models: Sequence[Subject], size: Callable[[Subject], int]) -> dict[str, int]:
    """Sizes of those that can be there at the same time whatever happens: all that are loaded at the start, and the
    largest of those that give way to each other."""
    sizes = {it.spec.name: size(it) for it in models if it.spec.load != "on_demand"}
    given_way = {it.spec.name: size(it) for it in models if it.spec.load == "on_demand"}
    if given_way:
        largest = max(given_way, key=lambda name: given_way[name])
        sizes[largest] = given_way[largest]
    return sizes


def _bounded(it: Subject) -> int:
    """The most that a model can take: its engine keeps to its limit."""
    most = it.spec.memory.most
    return min(most, it.spec.memory_limit_bytes) if it.spec.memory_limit_bytes else most


def _terms(memory: ModelMemory) -> str:
    terms = [("weights", memory.weights), ("adapters", memory.adapters), ("draft", memory.draft)]
    given = [f"{name} {format_size(size)}" for name, size in terms if size]
    return " + ".join([*given, *([f"one request {format_size(memory.first)}"] if memory.first else [])])


def _sum(sizes: dict[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])
    terms = [f"{name} {format_size(sizes[name])}" for name in largest[:4]]
    if rest := sum(sizes[name] for name in largest[4:]):
        terms.append(f"{len(largest) - 4} more {format_size(rest)}")
    return " + ".join(terms)


def _rounded_up(size: int) -> str:
    """A size to write down: not below what is needed."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= 10 * unit:
            return f"{-(-size // unit)}{name}"
        if size >= unit:
            tenths = -(-size * 10 // unit)
            return f"{tenths // 10}{name}" if tenths % 10 == 0 else f"{tenths / 10:g}{name}"
    return str(size)


def _limited(loaded: Loaded) -> bool:
    return loaded.manifest.memory is not None and loaded.manifest.memory.limit is not None


def _place(loaded: Loaded) -> KeyPath:
    memory = loaded.manifest.memory
    if memory is None:
        return ("models",)
    return ("memory", "limit") if memory.limit is not None else ("memory",)
