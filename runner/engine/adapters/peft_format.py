"""Adapter folders as Hugging Face PEFT writes them: adapter_config.json and adapter_model.safetensors.

Tensors are `base_model.model.<module>.lora_A.weight` [r, in] and `….lora_B.weight` [out, r], both transposed here, and
`….lora_magnitude_vector` [out] for DoRA. The scale is lora_alpha / r, or lora_alpha / √r with use_rslora; both numbers
may differ by module (rank_pattern, alpha_pattern).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from runner.engine.adapters.formats import Adapter, AdapterRefusal, LowRank, read_tensors

_PREFIX: Final = "base_model.model."
_NAME: Final = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
_FILE: Final = "adapter_model.safetensors"


def read(folder: Path, config: Mapping[str, Any], scale: float | None) -> Adapter:
    """The folder's adapter; `scale` replaces its own. Raises AdapterRefusal."""
    _require_supported(config)
    if not (folder / _FILE).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterRefusal("adapter_model.bin is a pickle, which is not loaded; save it as safetensors")
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in read_tensors(folder / _FILE).items():
        match = _NAME.match(name.removeprefix(_PREFIX))
        if match is None:
            raise AdapterRefusal(f"{_FILE}: {name} is not a LoRA tensor of a linear layer")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    return Adapter({module: _layer(module, found, config, scale) for module, found in parts.items()})


def _require_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise AdapterRefusal(f"peft_type {kind} is not supported; only LORA is")
    if config.get("modules_to_save"):
        raise AdapterRefusal(f"modules_to_save ({config['modules_to_save']}) replaces whole layers of the base model")
    if config.get("bias", "none") != "none":
        raise AdapterRefusal(f"bias {config['bias']!r} changes the base model's biases")
    for key in ("lora_bias", "fan_in_fan_out", "trainable_token_indices", "layer_replication", "target_parameters"):
        if config.get(key):
            raise AdapterRefusal(f"adapter_config.json sets {key}, which is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise AdapterRefusal(f"init_lora_weights {start!r} also changed the base model; convert it to plain LoRA first")


def _layer(module: str, parts: Mapping[str, mx.array], config: Mapping[str, Any], scale: float | None) -> LowRank:
    names = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if config.get("use_dora") else ()))
    for name in names:
        if name not in parts:
            raise AdapterRefusal(f"{_FILE}: {_PREFIX}{module}.{name} is missing")
    a, b = parts["lora_A"], parts["lora_B"]
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterRefusal(f"{_FILE}: {_PREFIX}{module} does not hold matrices")
    if scale is None:
        scale = _own_scale(module, a.shape[0], config)
    magnitude = parts.get("lora_magnitude_vector")
    return LowRank(a.T, scale * b.T, None if magnitude is None else magnitude.reshape(-1))


def _own_scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _by_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha"))
    declared = _by_pattern(module, config.get("rank_pattern"), config.get("r"))
    if not isinstance(alpha, int | float):
        raise AdapterRefusal("adapter_config.json: lora_alpha is missing")
    if declared != rank:
        raise AdapterRefusal(f"{_FILE}: {_PREFIX}{module}.lora_A has rank {rank}, adapter_config.json says {declared}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(module: str, patterns: Any, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
