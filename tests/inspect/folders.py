"""Model and adapter folders of any size, without their data: headers, configurations and tokenizers only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.plan.folders import write

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Names to types and shapes."""

GEOMETRY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_tensors(path: Path, tensors: Tensors, tool: str | None = "mlx") -> Path:
    """A safetensors file whose data are a hole: it takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": tool}} if tool else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    write(path, len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def llama_tensors(config: Mapping[str, Any], dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Those of a llama of this geometry."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, hidden)
    for block in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{block}.{name}.weight"] = shape
    return {name: (dtype, shape) for name, shape in found.items()}


def write_llama(folder: Path, *, tokens: Iterable[str] = (), tool: str | None = "mlx", **changes: Any) -> Path:
    """A whole folder; `changes` are keys of config.json, `tokens` the first of its vocabulary."""
    config = {**GEOMETRY, **changes}
    write(folder / "config.json", json.dumps(config))
    write_tokenizer(folder, tokens)
    write_tensors(folder / "model.safetensors", llama_tensors(config), tool)
    return folder


def write_tokenizer(folder: Path, tokens: Iterable[str] = (), size: int = 300, eos: str = "<|end|>") -> None:
    """tokenizer.json and tokenizer_config.json with a vocabulary that begins with `tokens`, after the special ones."""
    first = ["<|bos|>", "<|end|>", *tokens]
    words = [*first, *(f"word{i}" for i in range(len(first), size))]
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(words[:2])]
    model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []}
    write(folder / "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": eos}, "chat_template": "{{ messages }}"}
    write(folder / "tokenizer_config.json", json.dumps(settings))


def write_lora(
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    dtype: str = "F32",
    parameters: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """An adapter as mlx-lm writes it, of layers by path with their inputs and outputs."""
    tensors = {}
    for path, (inputs, outputs) in layers.items():
        tensors[f"{path}.lora_a"] = (dtype, (inputs, rank))
        tensors[f"{path}.lora_b"] = (dtype, (rank, outputs))
    write_tensors(folder / "adapters.safetensors", tensors)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 20.0, "dropout": 0.0, **(parameters or {})},
        **config,
    }
    write(folder / "adapter_config.json", json.dumps(settings))
    return folder


def write_peft(folder: Path, layers: Mapping[str, tuple[int, int]], *, rank: int = 4, **config: Any) -> Path:
    """An adapter as PEFT writes it."""
    tensors = {}
    for path, (inputs, outputs) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = ("F32", (rank, inputs))
        tensors[f"base_model.model.{path}.lora_B.weight"] = ("F32", (outputs, rank))
    write_tensors(folder / "adapter_model.safetensors", tensors, "pt")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "org/base", **config}
    write(folder / "adapter_config.json", json.dumps(settings))
    return folder


def queries(blocks: Iterable[int], inputs: int = 256, outputs: int = 256) -> dict[str, tuple[int, int]]:
    """The query projections of these blocks."""
    return {f"model.layers.{block}.self_attn.q_proj": (inputs, outputs) for block in blocks}
