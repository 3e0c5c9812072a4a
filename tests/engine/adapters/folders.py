"""Adapter folders with random weights, in both formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.engine.loader import LoadedModel

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def linear_shapes(loaded: LoadedModel, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the layers whose path ends with one of `keys`."""
    import mlx.nn as nn

    shapes = {}
    for path, module in loaded.model.named_modules():
        if path.endswith(tuple(keys)) and isinstance(module, nn.Linear | nn.QuantizedLinear):
            outputs, inputs = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                inputs = inputs * 32 // module.bits
            shapes[path] = (inputs, outputs)
    return shapes


def draw(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, tuple[mx.array, mx.array]]:
    """A [in, r] and B [r, out] for every layer, large enough to change what the model says."""
    key = mx.random.key(seed)
    drawn = {}
    for path, (inputs, outputs) in sorted(shapes.items()):
        key, one, two = mx.random.split(key, 3)
        drawn[path] = (
            mx.random.normal((inputs, rank), key=one) / inputs**0.5,
            mx.random.normal((rank, outputs), key=two) / rank**0.5,
        )
    return drawn


def write_mlx(
    folder: Path,
    pairs: Mapping[str, tuple[mx.array, mx.array]],
    *,
    keys: Iterable[str] | None = ATTENTION,
    num_layers: int = -1,
    scale: float = 1.0,
    magnitudes: Mapping[str, mx.array] | None = None,
    rank: int | None = None,
    **config: Any,
) -> Path:
    """As `mlx_lm.lora` writes it; DoRA with `magnitudes`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = a, b
    for path, magnitude in (magnitudes or {}).items():
        tensors[f"{path}.m"] = magnitude
    rank = rank or (next(iter(pairs.values()))[0].shape[-1] if pairs else 4)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = list(keys)
    settings = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
        **config,
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_peft(
    folder: Path,
    pairs: Mapping[str, tuple[mx.array, mx.array]],
    *,
    alpha: float = 8.0,
    magnitudes: Mapping[str, mx.array] | None = None,
    **config: Any,
) -> Path:
    """As `peft` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.contiguous(a.T)
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.contiguous(b.T)
    for path, magnitude in (magnitudes or {}).items():
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
    rank = next(iter(pairs.values()))[0].shape[-1] if pairs else 4
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_dora": bool(magnitudes), **config}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
