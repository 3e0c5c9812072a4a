"""Whether the models fit, by arithmetic on file headers, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runner.errors import Diagnostic
from runner.manifest.load import Loaded
from runner.manifest.models import Memory
from runner.manifest.tree import KeyPath
from runner.manifest.values import format_size
from runner.plan.spec import ModelSpec


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
    parts = format_size(limit) + (" (all of this machine)" if limit == machine_memory else "")
    if memory is not None and memory.limit is not None and memory.limit.percent is not None:
        parts = f"{format_size(limit)} ({memory.limit} of {format_size(machine_memory)})"
    if reserve:
        parts += f" - {format_size(reserve)} reserve = {format_size(max(0, limit - reserve))}"
    return MemoryBudget(limit, reserve, machine_memory, parts, max(1, limit - reserve) if declared else 0)


def check_memory(
    loaded: Loaded, models: Sequence[ModelSpec], budget: MemoryBudget, adapter_bytes: Mapping[str, int]
) -> list[Diagnostic]:
    """What does not fit: a model into its own `memory_limit`, or all of them into `memory`.

    Counts weights, adapters and prefix caches; KV caches and activations come on top and are admitted as they grow.
    """
    found = []
    for model in models:
        needed = model.weights_bytes + adapter_bytes.get(model.name, 0)
        if model.memory_limit_bytes and needed > model.memory_limit_bytes:
            limit = format_size(model.memory_limit_bytes)
            message = f"is {limit}, but the weights alone take {format_size(needed)}"
            hint = f"give more than {format_size(needed)}, or use a smaller or quantised model"
            found.append(loaded.at(("models", model.name, "memory_limit"), message, hint, code="E701"))
    return found + _all_together(loaded, models, budget, adapter_bytes)


def _all_together(
    loaded: Loaded, models: Sequence[ModelSpec], budget: MemoryBudget, adapter_bytes: Mapping[str, int]
) -> list[Diagnostic]:
    weights = {m.name: m.weights_bytes + adapter_bytes.get(m.name, 0) for m in models}
    caches = sum(m.limits.prefix_cache_bytes for m in models)
    needed = sum(weights.values()) + caches
    if needed <= budget.usable:
        return []
    largest = sorted(weights, key=lambda name: -weights[name])
    terms = [f"{name} {format_size(weights[name])}" for name in largest[:4]]
    if rest := sum(weights[name] for name in largest[4:]):
        terms.append(f"{len(largest) - 4} more {format_size(rest)}")
    if caches:
        terms.append(f"prefix caches {format_size(caches)}")
    message = f"the models need {format_size(needed)} ({' + '.join(terms)}), and may use {budget.explained}"
    hint = "raise memory.limit, lower kv_cache.prefix_cache, or serve fewer models"
    return [loaded.at(_place(loaded), message, hint, code="E702")]


def _place(loaded: Loaded) -> KeyPath:
    memory = loaded.manifest.memory
    if memory is None:
        return ("models",)
    return ("memory", "limit") if memory.limit is not None else ("memory",)
