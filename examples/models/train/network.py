"""The two networks, and how they and the adapters lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from .tokenizer import BOS, END, PAD, SPECIAL

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# Every width is a multiple of 64, and so is a head, so that weights and KV quantise in groups of 64.
SHAPES: dict[str, dict[str, int]] = {
    "demo-chat": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "demo-draft": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
}
LORA_KEYS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
LORA = {"rank": 8, "scale": 4.0, "dropout": 0.0, "keys": list(LORA_KEYS)}


def model_config(name: str, vocabulary: int) -> dict[str, Any]:
    ids = {"pad_token_id": SPECIAL.index(PAD), "bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(END)}
    return _COMMON | SHAPES[name] | {"vocab_size": vocabulary} | ids


def new_model(config: dict[str, Any], seed: int) -> Model:
    mx.random.seed(seed)
    return Model(ModelArgs.from_dict(config))


def add_lora(model: Model, seed: int) -> None:
    mx.random.seed(seed)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)


def parameter_count(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def _save(path: Path, parameters: Any) -> None:
    stored = tree_map(lambda array: array.astype(mx.bfloat16), parameters)
    mx.save_safetensors(str(path), dict(tree_flatten(stored)), metadata={"format": "mlx"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_model(model: Model, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "model.safetensors", model.parameters())
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)


def save_adapter(model: Model, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "adapters.safetensors", model.trainable_parameters())
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
    _write_json(folder / "adapter_config.json", config)
