"""The geometry of a real model, and models of random weights in it, drawn on the device."""

from __future__ import annotations

import importlib
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_map

_LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
GEOMETRIES: Final[dict[str, dict[str, Any]]] = {
    "llama-1b": {  # Llama-3.2-1B
        **_LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "dtype": "bfloat16",
    },
    "small": {
        **_LLAMA,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 640,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "dtype": "float32",
    },
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 2048,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "dtype": "float32",
    },
}
"""What config.json says, and in which type the weights are."""


def draw_model(geometry: dict[str, Any], seed: int = 0) -> Any:
    """An evaluated model of that geometry. Norms are one, products keep the size of what goes in, and logits have a
    spread of 2, whatever the hidden size."""
    mx.random.seed(seed)
    model = upstream_model(geometry)
    dtype = getattr(mx, geometry["dtype"])
    model.update(tree_map(lambda value: _draw(value).astype(dtype), model.parameters()))
    model.model.embed_tokens.weight = 2 * model.model.embed_tokens.weight
    mx.eval(model.parameters())
    return model


def upstream_model(geometry: dict[str, Any]) -> Any:
    """As upstream makes it, its weights not drawn yet."""
    # Imported here: who asks for a name above need not pay for mlx_lm, nor for the limits that it sets.
    llama = importlib.import_module("mlx_lm.models.llama")
    return llama.Model(llama.ModelArgs.from_dict(geometry))


def _draw(value: mx.array) -> mx.array:
    return mx.random.normal(value.shape) * value.shape[-1] ** -0.5 if value.ndim > 1 else value


def on_gpu() -> bool:
    """Whether the real geometry makes sense here."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def usual() -> str:
    """Name of the geometry to measure here where none is asked for."""
    return "llama-1b" if on_gpu() else "small"
