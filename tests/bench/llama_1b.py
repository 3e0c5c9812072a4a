"""A model folder of a known geometry with random weights, its tokenizer, and nine LoRA adapters. Needs no network.

    python tests/bench/llama_1b.py FOLDER [--geometry llama-1b|small|tiny] [--bits 4]

Writes FOLDER/model and FOLDER/adapters/a0 … a8. What a server does per token does not depend on what the weights say,
so random ones measure as well as trained ones. The tokenizer has as many tokens as the model: byte-level BPE trained on
the words that the load generator draws from, and filler tokens, each of which is text of its own when decoded. Answers
end by length: the end token's row is zero, so that its logit is, which is never the largest and lies outside of the
upper 0.9 of the distribution at temperatures below 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from runner.bench.prompts import WORDS  # noqa: E402
from tests.bench.geometry import GEOMETRIES, draw_model  # noqa: E402

SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
LINEAR = (*ATTENTION, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ADAPTERS = 9


def build(folder: Path, geometry: str = "llama-1b", *, bits: int = 0, seed: int = 0) -> Path:
    """Writes model and adapters where they are not there yet. Returns the model's folder."""
    model = folder / "model"
    if not (model / "config.json").exists():
        _build_model(model, GEOMETRIES[geometry], bits, seed)
    for number in range(ADAPTERS):
        adapter = folder / "adapters" / f"a{number}"
        if not (adapter / "adapter_config.json").exists():
            keys, rank = (ATTENTION, 8) if number % 2 == 0 else (LINEAR, 16)
            _build_adapter(adapter, GEOMETRIES[geometry], keys, rank, seed + number + 1)
    return model


def _build_model(folder: Path, geometry: dict[str, Any], bits: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder, geometry["vocab_size"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": SPECIAL.index("<|bos|>"),
        "eos_token_id": SPECIAL.index("<|end|>"),
        "pad_token_id": SPECIAL.index("<|pad|>"),
        **geometry,
    }
    config["torch_dtype"] = config.pop("dtype")
    model = draw_model(geometry, seed)
    embedding = model.model.embed_tokens.weight
    embedding[config["eos_token_id"]] = 0
    model.model.embed_tokens.weight = embedding
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits}
        nn.quantize(model, group_size=64, bits=bits)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def build_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer with `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 1024),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 3, trainer)
    written = json.loads(tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    for number in range(len(vocabulary), size):
        vocabulary[f"Ġfiller{number}"] = number  # no merge leads here: prompts never have one, answers do
    (folder / "tokenizer.json").write_text(json.dumps(written, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _build_adapter(folder: Path, geometry: dict[str, Any], keys: tuple[str, ...], rank: int, seed: int) -> None:
    """As `mlx_lm.lora` writes it, for all layers."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(seed)
    tensors = {}
    for layer in range(geometry["num_hidden_layers"]):
        for key in keys:
            inputs, outputs = _shape(geometry, key)
            name = f"model.layers.{layer}.{key}"
            tensors[f"{name}.lora_a"] = mx.random.normal((inputs, rank)) * inputs**-0.5
            tensors[f"{name}.lora_b"] = mx.random.normal((rank, outputs)) * 0.1 * rank**-0.5
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": geometry["num_hidden_layers"],
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": list(keys)},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _shape(geometry: dict[str, Any], key: str) -> tuple[int, int]:
    hidden, inner = geometry["hidden_size"], geometry["intermediate_size"]
    queries = geometry["num_attention_heads"] * geometry["head_dim"]
    keys = geometry["num_key_value_heads"] * geometry["head_dim"]
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }[key.rpartition(".")[2]]


def main() -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-1b")
    parser.add_argument("--bits", type=int, default=0)
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.geometry, bits=arguments.bits))


if __name__ == "__main__":
    main()
