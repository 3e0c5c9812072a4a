"""A model of random weights in the geometry of a real one, built in memory: no files, no tokenizer."""

from __future__ import annotations

import importlib
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_map

LLAMA_1B: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
SMALL: Final[dict[str, Any]] = {
    **LLAMA_1B,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


def build(config: dict[str, Any], dtype: mx.Dtype) -> Any:
    """The model, evaluated."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


def on_gpu() -> bool:
    """Whether the real geometry makes sense here."""
    return bool(mx.default_device() == mx.Device(mx.gpu))
