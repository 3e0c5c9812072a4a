"""Model folders small enough to build in a test: random weights, a byte-level tokenizer, a chat template.

Weights are drawn so that logits are far apart: rounding differs between batch sizes, and must not decide a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today? I am fine, thank you",
    "números, größe, naïve café, 東京 and 🦜 are not ASCII",
    "def main(): return 42",
]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "qwen3": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "gemma3_text": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_local_base_freq": 10000,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "max_position_embeddings": 512,
    },
    "qwen3_moe": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 512,
    },
    "lfm2": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "rope_theta": 10000,
        "max_position_embeddings": 512,
    },
}


WIDE: dict[str, dict[str, Any]] = {
    "": {"head_dim": 64},
    "lfm2": {"num_attention_heads": 1, "num_key_value_heads": 1},
}
"""What gives a model type heads of 64 values; "" for those that are not named."""


def build_model(
    folder: Path, model_type: str = "llama", *, seed: int = 0, bits: int = 0, config: Mapping[str, Any] | None = None
) -> Path:
    """A model folder with random float32 weights, affine-quantised to `bits` (groups of 32) unless that is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    settings = {
        "model_type": model_type,
        "architectures": [f"{model_type}ForCausalLM"],
        "vocab_size": backend().get_vocab_size(),
        "eos_token_id": backend().token_to_id("<|end|>"),
        **CONFIGS[model_type],
        **(config or {}),
    }
    model = _model(settings, seed)
    if bits:
        settings["quantization"] = {"group_size": 32, "bits": bits}
        nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


OWN_MODEL = """
from mlx_lm.models import llama

ModelArgs = llama.ModelArgs


class Model(llama.Model):
    def __call__(self, inputs, cache=None, *more, **named):
        return -super().__call__(inputs, cache, *more, **named)
"""
"""An architecture that takes the least likely token for the likeliest, so that one can tell that it ran."""

OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class Swapped(PreTrainedTokenizerFast):
    def encode(self, text, **named):
        return super().encode(text.swapcase(), **named)
"""
"""A tokenizer that reads small letters as large ones."""


def bring_code(folder: Path, *, model: bool = True, tokenizer: bool = True) -> Path:
    """Have a model folder need Python code that it brings: for its architecture, its tokenizer or both."""
    config = json.loads((folder / "config.json").read_text())
    if model:
        (folder / "own_model.py").write_text(OWN_MODEL)
        config["model_file"] = "own_model.py"
    if tokenizer:
        (folder / "own_tokenizer.py").write_text(OWN_TOKENIZER)
        own = {"AutoTokenizer": [None, "own_tokenizer.Swapped"]}
        build_tokenizer(folder, tokenizer_class="Swapped", auto_map=own)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _model(settings: Mapping[str, Any], seed: int) -> Any:
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(dict(settings)))
    key = mx.random.key(seed)
    drawn = []
    for name, value in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        if value.ndim > 1:
            # Twice the usual spread in the head keeps the most likely token well ahead.
            spread = (4.0 if "lm_head" in name or "embed" in name else 1.0) / value.shape[-1] ** 0.5
            value = mx.random.normal(value.shape, key=own) * spread
        drawn.append((name, value))
    model.update(tree_unflatten(drawn))
    return model


@cache
def backend() -> Tokenizer:
    """A byte-level BPE tokenizer with about 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    return tokenizer


def build_tokenizer(folder: Path, **settings: Any) -> None:
    """tokenizer.json and tokenizer_config.json, with `settings` added to the latter."""
    backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def encode(text: str) -> list[int]:
    """Ids of plain text, nothing added."""
    ids: list[int] = backend().encode(text, add_special_tokens=False).ids
    return ids
