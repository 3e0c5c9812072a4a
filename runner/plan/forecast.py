"""What a plan does to memory, and who has to make room before others start. Pure, like the planner."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from runner.plan.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of all engines together, with one request each: `before`, `after`, and at most (`peak`) while old and new
    overlap. `most` is what comes after with every row at its longest, as far as the models' limits let it; `limit` is
    what may be used."""

    before: int
    after: int
    peak: int
    most: int
    limit: int


ENGINE_BYTES: Final = 100 * 2**20
"""Of an engine's process beside its model: Python, and the libraries of MLX (84 to 96 MiB on a Linux CPU)."""


def least(spec: ModelSpec) -> int:
    """Bytes that an engine of this spec needs beside its process: weights, adapters, a draft, and the first step of a
    request."""
    return spec.memory.least or spec.weights_bytes


def with_process(spec: ModelSpec) -> int:
    """The same and its process."""
    return least(spec) + ENGINE_BYTES


def footprint(spec: ModelSpec) -> int:
    """Bytes that a plan reckons with, process and all. A model that is loaded on demand has none: it comes when there
    is room, and gives way (`runner.control.room`)."""
    return 0 if spec.load == "on_demand" else with_process(spec)


def most(spec: ModelSpec) -> int:
    """Bytes that an engine of this spec comes to, when it is as busy as it can be, beside those of its process."""
    needed = spec.memory.most or spec.weights_bytes
    return min(needed, spec.memory_limit_bytes) if spec.memory_limit_bytes else needed


def total(models: Iterable[ModelSpec]) -> int:
    """Bytes that engines of these specs hold together."""
    return sum(footprint(model) for model in models)


def make_room(needed: int, *groups: Sequence[ModelSpec]) -> frozenset[str]:
    """Names of the engines to end first, so that `needed` bytes more can be had; all of them where that is too few.

    A later group is touched only once an earlier one is not enough. Within one as few as possible, and of those that
    would do alone the smallest, so that the least is loaded again should the plan fail.
    """
    chosen: list[ModelSpec] = []
    for group in groups:
        left = sorted(group, key=lambda model: (footprint(model), model.name))
        while needed > 0 and left:
            at = min(bisect_left(left, needed, key=footprint), len(left) - 1)
            chosen.append(left.pop(at))
            needed -= footprint(chosen[-1])
    kept = []
    for model in reversed(chosen):  # a later pick may have made an earlier one unnecessary
        if needed + footprint(model) <= 0:
            needed += footprint(model)
        else:
            kept.append(model.name)
    return frozenset(kept)
