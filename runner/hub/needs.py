"""Which files of a repository are fetched: safetensors and what belongs to them, never other weights, and code only by
consent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from runner.hub.jobs import Kind

_OF_A_MODEL: Final = (
    "*.json",
    "model*.safetensors",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
)
"""As mlx-lm has it, without Python files."""

CODE: Final = "*.py"
"""Of a model whose entry says `trust_remote_code`: all of them, since they import each other."""

_OF_AN_ADAPTER: Final = ("adapter_config.json", "adapters.safetensors", "adapter_model.safetensors")
"""Without the checkpoints of training beside them."""

_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".gguf", ".npz", ".onnx", ".h5", ".safetensors")


def needed(names: Iterable[str], kinds: Collection[Kind], *, code: bool = False) -> list[str]:
    """Of a repository's files those that it takes to serve it as one of `kinds`; with its `code` or without."""
    patterns = [p for kind in kinds for p in (_OF_A_MODEL if kind == "model" else _OF_AN_ADAPTER)]
    patterns += [CODE] if code else []
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_weights(name: str) -> bool:
    """Whether a file of a model's folder holds weights, as mlx-lm looks for them."""
    return name.startswith("model") and name.endswith(".safetensors")


def kinds_of(names: Collection[str]) -> tuple[Kind, ...]:
    """What a repository can be, by its files."""
    return ("adapter",) if "adapter_config.json" in names and "config.json" not in names else ("model",)


def lacking(names: Sequence[str], kinds: Collection[Kind]) -> str:
    """What keeps a repository from being one of `kinds`, in words; empty where nothing does."""
    if "model" in kinds:
        if "config.json" not in names:
            return "it holds an adapter" if "adapter_config.json" in names else "it holds no config.json"
        if not any(fnmatchcase(name, "model*.safetensors") for name in names):
            others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
            return "it holds no model*.safetensors" + (f", but {others[0]}" if others else "")
    if "adapter" in kinds:
        if "adapter_config.json" not in names:
            return "it holds a model" if "config.json" in names else "it holds no adapter_config.json"
        if not {"adapters.safetensors", "adapter_model.safetensors"} & set(names):
            return "it holds no adapters.safetensors"
    return ""
