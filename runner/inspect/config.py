"""config.json as it is: typed access to what a model says of its geometry, under the names that its family uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.inspect.files import BadFolder, json_object

_SAME_AS: Final = {
    "mistral": "llama",
    "llava": "mistral3",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2_5_vl": "qwen2_vl",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "xverse": "llama",
    "gemma4_unified": "gemma4",
    "deepseek_v41_text": "deepseek_v41",
}
"""Model types that mlx-lm runs as another (`MODEL_REMAPPING` of its utils.py, 0.32)."""

_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""As `runner.engine.loader` reads them."""


_MAX_LAYERS: Final = 10_000


class Packing(NamedTuple):
    """How weights are quantised."""

    bits: int
    group_size: int
    mode: str = "affine"


class Config:
    """A model's configuration. Keys of a nested `text_config` come before those around it.

    `architecture` is the model type as mlx-lm runs it (`llama` for `mistral`); of a wrapper around a text model it is
    the wrapper's.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        nested = data.get("text_config")
        self.where = where
        self.top = data
        self.data: dict[str, Any] = {**data, **nested} if isinstance(nested, Mapping) else dict(data)
        stated = data.get("model_type")
        self.model_type = stated if isinstance(stated, str) else ""
        self.architecture = _SAME_AS.get(self.model_type, self.model_type)

    def get(self, *names: str) -> Any:
        """The first of the keys that is there and not null, else None."""
        return next((value for name in names if (value := self.data.get(name)) is not None), None)

    def count(self, *names: str, default: int | None = None) -> int:
        """A count under the first of the keys that is there. Raises BadFolder: not there, or not a count."""
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(f"has no {names[0]}")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
            raise self.wrong(f"{names[0]} is {value!r}, not a count")
        return value

    def items(self, *names: str) -> list[Any]:
        """A list under the first of the keys that is there. Raises BadFolder."""
        value = self.get(*names)
        if not isinstance(value, list):
            raise self.wrong(f"{names[0]} is {'missing' if value is None else 'no list'}")
        return value

    def section(self, name: str) -> Config:
        """A nested object. Raises BadFolder where it is none."""
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            raise self.wrong(f"{name} is {'missing' if value is None else 'no object'}")
        return Config(value, self.where)

    def wrong(self, message: str) -> BadFolder:
        """What is wrong with the file, to be raised."""
        return BadFolder("E603", f"{self.where} {message}", "download or convert the model again")

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        count = self.count("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
        if count > _MAX_LAYERS:
            raise self.wrong(f"has {count} layers")
        return count

    @property
    def hidden(self) -> int:
        """Width of the activations between blocks."""
        return self.count("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.count("num_attention_heads", "n_heads", "n_head", "num_heads")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        names = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
        return self.heads if self.get(*names) is None else self.count(*names)

    @property
    def head_dim(self) -> int:
        """Width of a head, as stated or by division."""
        stated = self.get("head_dim")
        return self.count("head_dim") if stated is not None else self.hidden // max(1, self.heads)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings of; 0 where it does not say."""
        return self.count("vocab_size", "num_vocab", default=0)

    @property
    def max_context(self) -> int:
        """The most tokens the model is made for; 0 where it does not say."""
        for source in (self.top, self.data):
            for key in _CONTEXT_KEYS:
                if isinstance(value := source.get(key), int) and value > 0:
                    return value
        return 0

    @property
    def quantization(self) -> Packing | None:
        """As mlx-lm writes it; None for weights that are not quantised, or were by another tool."""
        return _packing(self.data.get("quantization"), Packing(4, 64))

    @property
    def quantized_elsewhere(self) -> str:
        """The method of another tool that packed the weights, or empty."""
        section = self.data.get("quantization_config")
        if "quantization" in self.data or not isinstance(section, Mapping):
            return ""
        return str(section.get("quant_method") or "another tool")

    def packing(self, path: str) -> Packing:
        """That of one layer: its own entry, else that of all."""
        section = self.data.get("quantization")
        own = section.get(path) if isinstance(section, Mapping) else None
        all_layers = self.quantization or Packing(4, 64)
        return _packing(own, all_layers) or all_layers

    def layer_types(self, default: Iterable[str] | None = None) -> list[str]:
        """One word a block. Raises BadFolder where they are not as many as blocks."""
        value = self.get("layer_types", "layers_block_type")
        types = [str(kind) for kind in value] if isinstance(value, list) else list(default or ())
        if len(types) != self.layers:
            raise self.wrong(f"has {len(types)} layer_types for {self.layers} layers")
        return types


def _packing(section: object, default: Packing) -> Packing | None:
    if not isinstance(section, Mapping):
        return None
    bits, size, mode = section.get("bits"), section.get("group_size"), section.get("mode")
    return Packing(
        bits if isinstance(bits, int) and bits > 0 else default.bits,
        size if isinstance(size, int) and size > 0 else default.group_size,
        mode if isinstance(mode, str) else default.mode,
    )


def read_config(path: Path) -> Config:
    """Raises BadFolder."""
    return Config(json_object(path), path.name)
