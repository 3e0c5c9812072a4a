"""A target and a draft of random weights that agree as often as they are told to, for measuring what speculation gains.

How fast speculation is depends on the geometry of both models and on how often proposals are accepted, not on how the
models came to agree. Random weights agree on nothing; so the draft is the target's first layers, with its embedding and
head, and what the target's later layers add is scaled down until the draft's first choice is the target's own at a
given share of positions. The target still computes all of its layers. So the acceptance of such a pair is set by
construction; how high it came out in use is measured, and has to be shown with the rates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from runner.engine.loader import LoadedModel
from tests.bench.geometry import GEOMETRIES, draw_model, upstream_model
from tests.bench.in_memory import loaded, tokenizer

_POSITIONS: Final = 512
"""Tokens of the text on which agreement is set."""

_HALVINGS: Final = 12
"""Of the interval that the scale of the later layers is sought in, by its logarithm."""

_OUTPUTS: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""What a layer adds goes through one of these."""


def build_pair(
    scratch: Path, geometry: str, *, layers: int, agreement: float
) -> tuple[LoadedModel, LoadedModel, dict[str, float]]:
    """A target, its draft of `layers` layers, and how they were made: the scale found, and the agreement with it."""
    settings = GEOMETRIES[geometry]
    target = draw_model(settings)
    draft = _first_layers(target, {**settings, "num_hidden_layers": layers})
    text = mx.random.randint(0, settings["vocab_size"], (1, _POSITIONS), key=mx.random.key(1))
    choices = mx.argmax(draft(text), axis=-1)
    later = [(name, array) for name, array in tree_flatten(target.parameters()) if _is_later(name, layers)]
    low, high = -12.0, 0.0
    found = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        target.update(tree_unflatten([(name, array * 2.0**middle) for name, array in later]))
        found = mx.mean(mx.argmax(target(text), axis=-1) == choices).item()
        low, high = (middle, high) if found > agreement else (low, middle)
    words = tokenizer(scratch, geometry)
    made = {"scale": 2.0**middle, "agreement": found}
    return loaded(target, words, geometry), loaded(draft, words, geometry), made


def _first_layers(target: Any, settings: dict[str, Any]) -> Any:
    """A model of fewer layers with the target's own arrays."""
    model = upstream_model(settings)
    names = {name for name, _ in tree_flatten(model.parameters())}
    model.update(tree_unflatten([(name, array) for name, array in tree_flatten(target.parameters()) if name in names]))
    return model


def _is_later(name: str, layers: int) -> bool:
    parts = name.split(".")
    return name.endswith(_OUTPUTS) and int(parts[parts.index("layers") + 1]) >= layers
