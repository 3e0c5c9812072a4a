"""Draft models for tiny targets, and policies that propose whatever a test wants."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from runner.engine.loader import LoadedModel
from runner.engine.speculative.loading import speculate
from runner.engine.speculative.policy import Acceptance, Taken
from runner.engine.speculative.speculation import Speculation
from tests.engine.drive import Driver
from tests.engine.tiny import build_model

SLACK = 8
"""Tokens that models loaded for these tests can take back where they have windows."""

Kind = Literal["self", "perturbed", "unrelated"]


def draft_folder(target: Path, folder: Path, kind: Kind) -> Path:
    """A draft that always agrees with the target, mostly, or by chance only."""
    if kind == "unrelated":
        return build_model(folder, "llama", seed=99, config={"num_hidden_layers": 1})
    shutil.copytree(target, folder)
    if kind == "perturbed":
        weights: Any = mx.load(str(target / "model.safetensors"))
        key = mx.random.key(5)
        for name, value in weights.items():
            if value.ndim > 1 and mx.issubdtype(value.dtype, mx.floating):
                key, own = mx.random.split(key)
                weights[name] = value + 0.1 * mx.std(value) * mx.random.normal(value.shape, key=own)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


class Scripted:
    """Proposes as many tokens as a function says, whatever it costs."""

    def __init__(self, lengths: Callable[[], int]) -> None:
        self._lengths = lengths

    def decide(self, rows: Sequence[Acceptance], most: int, missed: Callable[[], int], *, changed: bool) -> int:
        assert missed() >= 0
        return min(most, self._lengths())

    def took(self, step: Taken) -> None:
        pass


def always(length: int) -> Scripted:
    """That many, every time."""
    return Scripted(lambda: length)


def erratic(seed: int = 1) -> Scripted:
    """Rounds of all lengths, and runs of plain steps between them."""
    dice = random.Random(seed)
    return Scripted(lambda: dice.choice((0, 0, 1, 2, 3, 4, 4, 5)))


def speculating(target: LoadedModel, draft: Path, policy: Scripted | None = None) -> Speculation:
    """Speculation with a draft; with the real policy where none is given."""
    speculation, notes = speculate(draft, target, SLACK)
    assert speculation is not None, notes
    if policy is not None:
        speculation.policy = policy
    return speculation


def of_four_rows(target: LoadedModel, draft: Path, prefill_step_size: int) -> Driver:
    """An engine that keeps prefixes, and has rounds of all lengths where tokens can be taken back."""
    return Driver(
        target,
        speculation=speculating(target, draft, erratic()) if target.layout.trimmable else None,
        max_rows=4,
        prefill_step_size=prefill_step_size,
        prefix_cache_bytes=1 << 24,
        num_draft_tokens=5,
    )
