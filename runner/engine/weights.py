"""A model folder's weights in upstream's model class.

The narrow way reads what `mlx_lm.convert` writes: safetensors shards, and either plain weights or a `quantization`
entry in config.json. Other packings (AWQ, GPTQ, FP8, ModelOpt, a tensor-wide scale) go through upstream's own loader.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.arrays import read_safetensors
from runner.engine.narrow import NotNarrow

_RESOLVED_ELSEWHERE: Final = frozenset({"bailing_hybrid"})
"""Types whose upstream class depends on more than the type."""

_PACKED_MODES: Final = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""(bits, group size) to the one mode that stores its scales as bytes with them."""


def narrow_model(folder: Path, config: Mapping[str, Any]) -> Any:
    """The model with its weights, not yet evaluated.

    Raises NotNarrow, FileNotFoundError (no weights) and ValueError (they do not fit the class).
    """
    model_class, arguments_class = _model_classes(config)
    weights = _read_weights(folder)
    model = model_class(arguments_class.from_dict(dict(config)))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if (quantization := config.get("quantization")) is not None:
        _quantize(model, quantization, weights)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    return model


def _model_classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    for key in ("model_file", "quantize_activations"):
        if config.get(key):
            raise NotNarrow(f"config.json sets {key}")
    if "quantization" not in config and ("quantization_config" in config or _text(config, "quantization_config")):
        raise NotNarrow("the weights are packed by another tool")
    model_type = str(config.get("model_type", ""))
    if not model_type.isidentifier() or model_type in _RESOLVED_ELSEWHERE:
        raise NotNarrow(f"models of type {model_type!r} are resolved by the full loader")
    name = f"mlx_lm.models.{model_type}"
    if importlib.util.find_spec(name) is None:
        raise NotNarrow(f"no model file is called {model_type}")
    module = importlib.import_module(name)
    if hasattr(module, "TOKENIZER_DEFAULTS"):
        raise NotNarrow(f"{model_type} brings its own chat template")
    return module.Model, module.ModelArgs


def _text(config: Mapping[str, Any], key: str) -> Any:
    nested = config.get("text_config")
    return nested.get(key) if isinstance(nested, Mapping) else None


def _read_weights(folder: Path) -> dict[str, mx.array]:
    if (folder / "hf_quant_config.json").exists():
        raise NotNarrow("the weights are packed by another tool")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors in {folder}")
    weights: dict[str, mx.array] = {}
    for file in files:
        weights.update(read_safetensors(str(file)))
    if any(name.endswith(".global_scale") for name in weights):
        raise NotNarrow("the weights have tensor-wide scales")
    return weights


def _quantize(model: Any, quantization: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Turn into quantised layers those whose weights are stored so.

    The map's own entry for a layer decides; else how its weight was packed, which the default may not tell.
    """

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            own: bool | dict[str, Any] = quantization[path]
            return own
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return _stored_packing(path, module, weights)

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=packing,
    )


def _stored_packing(path: str, module: Any, weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Group size, bits and mode, from the shapes of a packed weight and its scales."""
    scales = weights[f"{path}.scales"]
    inputs = module.weight.shape[-1]
    group_size = inputs // scales.shape[-1]
    bits = weights[f"{path}.weight"].shape[-1] * 32 // inputs
    if scales.dtype != mx.uint8:
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    mode = _PACKED_MODES.get((bits, group_size))
    if mode is None:
        raise ValueError(f"{path} is packed in {bits} bits with groups of {group_size}, which no mode has")
    return {"group_size": group_size, "bits": bits, "mode": mode}
