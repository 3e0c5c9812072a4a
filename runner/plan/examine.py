"""The checks of `runner.plan.model_checks` and `runner.plan.memory`, over a whole manifest."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import Diagnostic
from runner.inspect.files import DigestCache
from runner.machine import Machine
from runner.manifest.load import Loaded
from runner.manifest.tree import Problem
from runner.plan.memory import check_memory
from runner.plan.model_checks import check_model
from runner.plan.spec import ModelSpec
from runner.plan.subject import Subject, subject

Settings = Callable[[str], Mapping[str, Mapping[str, Any]]]
"""Of a model, the sections `kv_cache` and `batching` with defaults filled in."""


def examine(
    loaded: Loaded,
    models: Iterable[ModelSpec],
    absent: Container[Path],
    settings: Settings,
    machine: Machine,
    cache: DigestCache,
) -> tuple[tuple[ModelSpec, ...], list[Diagnostic]]:
    """The models with their `memory`, and what was found: errors and warnings, in the order of the manifest.

    `absent` are folders that are not downloaded, or not wholly: nothing is said of them.
    """
    problems: list[Problem] = []
    examined: list[Subject] = []
    for spec in models:
        it = subject(spec, loaded, absent, settings(spec.name), cache)
        problems += check_model(it, cache)
        memory = it.memory(float32=machine.float32)
        examined.append(it._replace(spec=replace(it.spec, memory=memory)))
    problems += check_memory(loaded, examined, machine)
    return tuple(it.spec for it in examined), [diagnose(loaded, problem) for problem in problems]


def diagnose(loaded: Loaded, problem: Problem) -> Diagnostic:
    """A problem with its place; codes that begin with W are warnings."""
    found = loaded.tree.diagnostic(problem)
    return found._replace(severity="warning") if problem.code.startswith("W") else found
