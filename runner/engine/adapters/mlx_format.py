"""Adapter folders as `mlx_lm.lora` writes them: adapter_config.json and adapters.safetensors.

Tensors are `<module>.lora_a` [in, r] and `<module>.lora_b` [r, out], with `<module>.m` [out] for DoRA; for a layer of
experts [experts, r, in] and [experts, out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from runner.engine.adapters.formats import Adapter, AdapterRefusal, LowRank, read_tensors

_LEAVES: Final = ("lora_a", "lora_b", "m")


def read(folder: Path, config: Mapping[str, Any], scale: float | None) -> Adapter:
    """The folder's adapter; `scale` replaces its own. Raises AdapterRefusal."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterRefusal(f"fine_tune_type {kind!r} changes the weights themselves; serve it as a model of its own")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise AdapterRefusal("adapter_config.json has no lora_parameters")
    if scale is None:
        scale = parameters.get("scale")
    if not isinstance(scale, int | float):
        raise AdapterRefusal("adapter_config.json: lora_parameters.scale is missing")
    tensors = read_tensors(folder / "adapters.safetensors")
    layers = {
        module: _layer(module, parts, float(scale), dora=kind == "dora") for module, parts in _group(tensors).items()
    }
    return Adapter(layers, keys=_declared(parameters.get("keys")), last_layers=int(config.get("num_layers") or 0))


def _declared(keys: object) -> tuple[str, ...]:
    """The module names that the configuration lists. Without a list, what mlx-lm adapts has changed over time."""
    return tuple(str(key) for key in keys) if isinstance(keys, list) else ()


def _group(tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    grouped: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES or not module:
            raise AdapterRefusal(f"adapters.safetensors: {name} is not an adapter tensor (lora_a, lora_b or m)")
        grouped.setdefault(module, {})[leaf] = tensor
    return grouped


def _layer(module: str, parts: Mapping[str, mx.array], scale: float, *, dora: bool) -> LowRank:
    for leaf in _LEAVES[: 3 if dora else 2]:
        if leaf not in parts:
            raise AdapterRefusal(f"adapters.safetensors: {module}.{leaf} is missing")
    if not dora and "m" in parts:
        raise AdapterRefusal(f"adapters.safetensors has {module}.m, but adapter_config.json does not say dora")
    a, b = parts["lora_a"], parts["lora_b"]
    if a.ndim == 3:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return LowRank(a, scale * b, parts.get("m"))
