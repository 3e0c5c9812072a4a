"""How long a plan takes for a manifest of 1,000 models: `python tests/bench/plan_large.py [--models N] [--json]`.

In process, as the runner does it on every pass: desired × observed → plan → its JSON form. CPU milliseconds, the median
and the most of several rounds; the aim is 100 ms for the slowest edit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from runner.plan.planner import Observed, plan
from runner.plan.render import plan_json
from runner.plan.scope import Scope, within
from runner.plan.spec import AdapterSpec, Desired, EngineLimits, ListenerSpec, ModelSpec

GIB = 2**30
ROUNDS = 9


def manifest(count: int, version: int = 1) -> Desired:
    """So many models with two adapters, an alias and some settings each, on ten servers."""
    models = tuple(_model(number, version) for number in range(count))
    listeners = tuple(
        ListenerSpec(f"s{number}", "127.0.0.1", 8000 + number, tuple(m.name for m in models[number::10]))
        for number in range(10)
    )
    return Desired("large", models, listeners, memory_limit_bytes=3 * count * GIB)


def _model(number: int, version: int) -> ModelSpec:
    adapters = tuple(
        AdapterSpec(name, Path(f"/adapters/{name}-{number}"), f"{name}-{number}-{version}") for name in ("a", "b")
    )
    return ModelSpec(
        name=f"model-{number:04}",
        source=f"org/model-{number}",
        path=Path(f"/hub/model-{number}"),
        weights_digest=f"digest-{number}-{version}",
        weights_bytes=GIB,
        aliases=(f"alias-{number}",),
        adapters=adapters,
        generation={"temperature": 0.7, "max_tokens": 1024},
        limits=EngineLimits(max_context=16384, prefix_cache_bytes=GIB),
        memory_limit_bytes=2 * GIB,
    )


def edits(count: int) -> Iterator[tuple[str, Desired, Observed]]:
    """What is planned: its name, what is desired, what is observed."""
    wanted, other = manifest(count), manifest(count, version=2)
    running = Observed(wanted.models, wanted.listeners, memory_bytes=4 * count * GIB)
    renamed = replace(wanted, models=tuple(replace(m, name=f"new-{m.name}") for m in wanted.models))
    tight = replace(other, memory_limit_bytes=3 * count * GIB // 2)
    one = replace(wanted, models=(replace(wanted.models[0], aliases=("x",)), *wanted.models[1:]))
    yield "nothing runs", wanted, Observed(memory_bytes=4 * count * GIB)
    yield "nothing to do", wanted, running
    yield "one edit", one, running
    yield "all files changed", other, running
    yield "all changed, half fit beside", tight, running
    yield "all renamed", renamed, running
    yield "all removed", replace(wanted, models=(), listeners=()), running
    yield "one target", within(Scope(("model-0001",)), other, running), running


class Row(TypedDict):
    """One edit: how many actions it takes, and the CPU milliseconds of every round."""

    actions: int
    all_ms: list[float]


def measure(count: int, rounds: int = ROUNDS, enough: float = 0.0) -> dict[str, Row]:
    """By edit; with fewer rounds where one has taken no more than `enough`."""
    found: dict[str, Row] = {}
    for name, desired, observed in edits(count):
        taken: list[float] = []
        while len(taken) < rounds and min(taken, default=enough + 1) > enough:
            gc.collect()
            began = time.process_time()
            data = plan_json(plan(desired, observed))
            taken.append(round((time.process_time() - began) * 1000, 1))
        found[name] = {"actions": len(data["actions"]), "all_ms": taken}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.models)
    if arguments.json:
        print(json.dumps({"models": arguments.models, "edits": found}, indent=2))
        return 0
    print(f"{arguments.models} models, Python {sys.version.split()[0]}, CPU ms of {ROUNDS} rounds")
    for name, row in found.items():
        median, most = statistics.median(row["all_ms"]), max(row["all_ms"])
        print(f"{name:<30} {row['actions']:>5} actions  median {median:>6}  most {most:>6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
