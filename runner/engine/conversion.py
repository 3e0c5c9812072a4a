"""A model folder, quantised, as another: what mlx_lm.convert does.

Quantising is upstream's own (`mlx_lm.utils.quantize_model`, with what each model says of its layers); what differs is
that it is written a gigabyte at a time, so that memory holds no more than that, and that the tokenizer's files are
copied as they are instead of being written anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.utils import make_shards, quantize_model, save_config

from runner.engine.loader import load_weights

_SHARD_GB: Final = 1
_COPIED: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_NOT_COPIED: Final = frozenset({"config.json", "model.safetensors.index.json"})


class Refused(Exception):  # noqa: N818 - a condition
    """The source cannot be converted so; the message says why."""


def convert(source: Path, target: Path, settings: Mapping[str, Any], tell: Callable[[int, int], None]) -> None:
    """Write `source`, quantised, into the folder `target`, which is new.

    `settings` has `bits`, `group_size`, `mode`, `layers` (patterns to such a mapping, or False), `dtype` ("" for what
    config.json says) and `trust_remote_code`. `tell` gets the bytes that are written, and all of them. Raises Refused,
    OSError, and what upstream raises.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization" in config or "quantization_config" in config:
        raise Refused("the source is quantised already")
    model, config = load_weights(source, config, [], trust_remote_code=settings["trust_remote_code"])
    _cast(model, settings["dtype"] or _stated_dtype(config))
    predicate = _Rules(settings["layers"], getattr(model, "quant_predicate", None))
    model, config = quantize_model(
        model,
        config,
        settings["group_size"],
        settings["bits"],
        mode=settings["mode"],
        quant_predicate=predicate,
    )
    if unused := predicate.unused:
        raise Refused(f"quantization.layers: {', '.join(unused)} matches no layer that can be quantised")
    config["quantization"] |= predicate.left
    target.mkdir(parents=True)
    _write_weights(model, target, tell)
    _copy_rest(source, target)
    save_config(config, target / "config.json")


def _write_weights(model: Any, target: Path, tell: Callable[[int, int], None]) -> None:
    """Shard by shard, and each let go of before the next is computed."""
    weights = dict(tree_flatten(model.parameters()))
    total = sum(array.nbytes for array in weights.values())
    shards = make_shards(weights, _SHARD_GB)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    weights.clear()
    index: dict[str, str] = {}
    written = 0
    for number in range(len(shards)):
        shard, shards[number] = shards[number], {}
        name = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        for array in shard.values():
            mx.eval(array)
            written += array.nbytes
            tell(written, total)
        mx.save_safetensors(str(target / name), shard, metadata={"format": "mlx"})
        index |= dict.fromkeys(shard, name)
        del shard
        mx.clear_cache()
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=4)
    (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _stated_dtype(config: Mapping[str, Any]) -> str:
    """As mlx_lm.convert finds it."""
    nested = config.get("text_config")
    stated = config.get("torch_dtype") or (nested.get("dtype") if isinstance(nested, Mapping) else None)
    return stated if stated in ("float16", "bfloat16", "float32") else ""


def _cast(model: Any, name: str) -> None:

    if not name:
        return
    dtype, wanted = getattr(mx, name), getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: Any) -> Any:
        return array.astype(dtype) if wanted(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


class _Rules:
    """`quant_predicate` for upstream: the first rule that matches, else what the model itself says."""

    def __init__(self, rules: Mapping[str, Any], own: Callable[[str, Any], Any] | None) -> None:
        self._rules = rules
        self._own = own
        self._used: set[str] = set()
        self.left: dict[str, bool] = {}

    def __call__(self, path: str, module: Any) -> bool | dict[str, Any]:
        for pattern, rule in self._rules.items():
            if matches(pattern, path):
                self._used.add(pattern)
                if rule is False or module.weight.shape[-1] % rule["group_size"]:
                    self.left[path] = False
                    return False
                return dict(rule)
        decided: bool | dict[str, Any] = True if self._own is None else self._own(path, module)
        return decided

    @property
    def unused(self) -> list[str]:
        """Patterns that no layer had."""
        return [pattern for pattern in self._rules if pattern not in self._used]


def matches(pattern: str, path: str) -> bool:
    """Whether a layer's path is meant; a leading `*.` stands for nothing too. As `runner.inspect.quantize` has it."""
    return fnmatchcase(path, pattern) or (pattern.startswith("*.") and fnmatchcase(path, pattern[2:]))


def _copy_rest(source: Path, target: Path) -> None:
    """Whatever else of the source is small: its tokenizer, its templates."""
    for file in _small_files(source):
        shutil.copyfile(file, target / file.name)


def _small_files(source: Path) -> Iterator[Path]:
    for pattern in _COPIED:
        yield from (file for file in sorted(source.glob(pattern)) if file.name not in _NOT_COPIED and file.is_file())
