"""Whether the models fit, by arithmetic on file headers, before anything is started.

An error is what can never work: weights, adapters, drafts and the first step of one request. What only every row at
its longest would take is a warning: the engine lets rows wait (`runner.engine.memory`), and the message says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from runner.inspect.memory import ModelMemory
from runner.machine import Machine
from runner.manifest.load import Loaded
from runner.manifest.models import Memory
from runner.manifest.tree import KeyPath, Problem
from runner.manifest.values import format_size
from runner.plan.subject import Subject


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


def memory_budget(memory: Memory | None, machine_memory: int) -> MemoryBudget:
    """What the manifest's `memory` comes to on a machine with so many bytes."""
    limit = machine_memory if memory is None or memory.limit is None else memory.limit.of(machine_memory)
    reserve = 0 if memory is None else memory.reserve.of(machine_memory)
    declared = memory is not None and (memory.limit is not None or reserve > 0)
    parts = format_size(limit) + (" (all of the machine)" if limit == machine_memory else "")
    if memory is not None and memory.limit is not None and memory.limit.percent is not None:
        parts = f"{format_size(limit)} ({memory.limit} of {format_size(machine_memory)})"
    if reserve:
        parts += f" - {format_size(reserve)} reserve = {format_size(max(0, limit - reserve))}"
    return MemoryBudget(limit, reserve, machine_memory, parts, max(1, limit - reserve) if declared else 0)


def check_memory(loaded: Loaded, models: Sequence[Subject], machine: Machine) -> list[Problem]:
    """What does not fit: a model into its own `memory_limit`, or all of them into `memory`."""
    budget = memory_budget(loaded.manifest.memory, machine.memory)
    found: list[Problem] = []
    for it in models:
        if it.spec.memory_limit_bytes:
            found += _within_its_own(it)
    return found + list(_all_together(loaded, models, budget))


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
        yield Problem("E702", _place(loaded), message, "raise memory.limit, quantise, or serve fewer models")
        return
    most = _at_once(models, _bounded)
    if sum(most.values()) > budget.usable:
        free = [it for it in models if not it.spec.memory_limit_bytes]
        message = (
            f"with every row at its longest the models take {format_size(sum(most.values()))} ({_sum(most)}), and may "
            f"use {budget.explained}"
        )
        if free:
            hint = f"lower kv_cache.max_context or batching.max_rows of {free[0].spec.name}, or give it a memory_limit"
        else:
            hint = "lower the memory_limit of some"
        yield Problem("W702", _place(loaded), message, hint)


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


def _place(loaded: Loaded) -> KeyPath:
    memory = loaded.manifest.memory
    if memory is None:
        return ("models",)
    return ("memory", "limit") if memory.limit is not None else ("memory",)
