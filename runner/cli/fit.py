"""`mlx-run fit`: what each model takes, and the longest context and the most rows that there is memory for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.cli.locate import add_files
from runner.cli.machine import METAVAR, machine_of
from runner.cli.memory_table import memory_json, memory_table
from runner.errors import ManifestError, UsageError
from runner.inspect.files import DigestCache
from runner.machine import this_machine
from runner.manifest.load import load_manifest
from runner.manifest.values import format_size
from runner.plan.forecast import ENGINE_BYTES, least
from runner.plan.memory import MemoryBudget, memory_budget
from runner.plan.resolve import look
from runner.plan.spec import ModelSpec

_TOO_LARGE: Final = "E7"
"""Codes of what does not fit: that is the answer here, not an error."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", nargs="?", metavar="FILE", help="a manifest")
    add_files(parser, about="merge these, left to right")
    parser.add_argument(
        "--for",
        dest="machine",
        type=machine_of,
        metavar=METAVAR,
        help="reckon for another machine; without a GPU, MLX computes in float32 (default: gpu)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes and tokens")
    parser.epilog = (
        "example:\n  mlx-run fit configs/dev.yaml\n  mlx-run fit --for memory=16GiB configs/production.yaml\n\n"
        "A model may have what the others leave that are loaded with it: those without `load: on_demand`, each with\n"
        f"its weights and one request, and {ENGINE_BYTES // 2**20} MiB for each engine's process. Kept prefixes give\n"
        "way, and are not counted."
    )


class Fit(NamedTuple):
    """What there is memory for: `room` in bytes for this model, `rows` at once at its longest context, and the longest
    context for as many rows as it may have, and for one alone. Without a context that is known, tokens are 0."""

    room: int
    fits: bool
    rows: int
    context_all: int
    context_one: int


def run(arguments: argparse.Namespace) -> int:
    """0 when each model can answer a request beside the others, else 1. Raises ManifestError and UsageError."""
    names = [*([arguments.manifest] if arguments.manifest else []), *(arguments.files or [])]
    if not names:
        raise UsageError("no manifest is given", hint="Write its path, such as configs/dev.yaml.")
    loaded = load_manifest([Path(name) for name in names], os.environ)
    machine = arguments.machine or this_machine()
    seen = look(loaded, machine, DigestCache())
    if wrong := [diagnostic for diagnostic in seen.wrong if not diagnostic.code.startswith(_TOO_LARGE)]:
        raise ManifestError(wrong)
    budget = memory_budget(loaded.manifest.memory, machine)
    models = seen.desired.models
    fits = {model.name: fit(model, models, budget.usable) for model in models}
    if arguments.json:
        print(json.dumps(_json(models, budget, fits), indent=2))
    else:
        print(memory_table(models, budget), *_lines(models, fits), sep="\n")
    return int(not all(found.fits for found in fits.values()))


def fit(model: ModelSpec, models: Sequence[ModelSpec], usable: int) -> Fit:
    """What there is memory for, beside the others that are loaded at the same time; `usable` is in bytes."""
    others = [other for other in models if other.name != model.name and other.load == "eager"]
    room = max(0, usable - sum(map(least, others)) - (len(others) + 1) * ENGINE_BYTES)
    if model.memory_limit_bytes:
        room = min(room, model.memory_limit_bytes)
    memory = model.memory
    return Fit(
        room,
        memory.least <= room,
        memory.rows_within(room) if memory.context else 0,
        memory.context_within(room, max(1, memory.rows)),
        memory.context_within(room),
    )


def _lines(models: Sequence[ModelSpec], fits: dict[str, Fit]) -> list[str]:
    lines = []
    for model in models:
        found, memory = fits[model.name], model.memory
        if not found.fits:
            lines.append(
                f"{model.name}: does not fit: {format_size(memory.least)} needed, {format_size(found.room)} left"
            )
        elif not memory.context:
            lines.append(f"{model.name}: fits {format_size(found.room)}; nothing says how long its context is")
        else:
            lines.append(
                f"{model.name}: {format_size(found.room)} hold {found.rows} of {memory.rows} rows of {memory.context} "
                f"tokens, or {memory.rows} rows of {found.context_all}, or one of {found.context_one}"
            )
    return lines


def _json(models: Sequence[ModelSpec], budget: MemoryBudget, fits: dict[str, Fit]) -> dict[str, Any]:
    data = memory_json(models, budget)
    for name, found in fits.items():
        data["models"][name]["fit"] = found._asdict()
    return data
