"""What an adapter's folder holds: which layers it changes and by matrices of which shapes, by header alone.

Both formats, with the engine's own rules (`runner.engine.adapters`): what is refused here is refused there, and in the
same words. The engine also reads the values, and refuses those that are not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.inspect.files import BadFolder, json_object
from runner.inspect.tensors import at_block, first_block, numbered, read_header

MLX_FILE: Final = "adapters.safetensors"
PEFT_FILE: Final = "adapter_model.safetensors"
_MLX_LEAVES: Final = ("lora_a", "lora_b", "m")
_PEFT_NAME: Final = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_PEFT_PREFIX: Final = "base_model.model."
_PEFT_REFUSED: Final = (
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
)
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "loftq")

Shape = tuple[int, ...]


class Change(NamedTuple):
    """The same change to one layer of several blocks.

    `layer` has a `*` for the block's number, `blocks` a bit for each; a name without a number has 0. `experts` is empty
    for a plain layer. `a` is [*experts, in, r], `b` [*experts, r, out], `magnitude` [out] for DoRA.
    """

    layer: str
    blocks: int
    a: Shape
    b: Shape
    magnitude: Shape | None

    @property
    def rank(self) -> int:
        """r."""
        return self.a[-1]

    @property
    def example(self) -> str:
        """The path of one of the layers."""
        return at_block(self.layer, first_block(self.blocks))


class AdapterFacts(NamedTuple):
    """`nbytes` is what the files hold; `keys` and `last_layers` are what adapter_config.json says of the layers, as the
    engine reads them. `no_scale` is why it cannot be used unless the manifest gives it a scale, or empty. `base` is the
    model that it says it was trained on, or empty.
    """

    changes: tuple[Change, ...]
    nbytes: int = 0
    keys: tuple[str, ...] = ()
    last_layers: int = 0
    no_scale: str = ""
    base: str = ""

    @property
    def rank(self) -> int:
        """The largest."""
        return max((change.rank for change in self.changes), default=0)


def read_adapter(folder: Path) -> AdapterFacts:
    """Raises BadFolder with the reason for which the engine would refuse it."""
    config = json_object(folder / "adapter_config.json")
    return _read_peft(folder, config) if "peft_type" in config else _read_mlx(folder, config)


def _refused(message: str, hint: str = "train or convert the adapter again") -> BadFolder:
    return BadFolder("E606", message, hint)


def _grouped(layers: Mapping[str, tuple[Shape, Shape, Shape | None]]) -> tuple[Change, ...]:
    found: dict[tuple[str, Shape, Shape, Shape | None], int] = {}
    for path, shapes in layers.items():
        pattern, number = numbered(path)
        key = (path if pattern.count("*") > 1 else pattern, *shapes)
        found[key] = found.get(key, 0) | (0 if number is None or pattern.count("*") > 1 else 1 << number)
    return tuple(Change(layer, blocks, a, b, magnitude) for (layer, a, b, magnitude), blocks in found.items())


# ------------------------------------------------------------------ mlx-lm


def _read_mlx(folder: Path, config: Mapping[str, Any]) -> AdapterFacts:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        message = f"fine_tune_type {kind!r} changes the weights themselves"
        raise _refused(message, "fuse it with its base, and serve it as a model of its own")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise _refused("adapter_config.json has no lora_parameters")
    keys, last = parameters.get("keys"), config.get("num_layers") or 0
    if not isinstance(last, int):
        raise _refused(f"adapter_config.json: num_layers is {last!r}, not a number")
    header, _ = read_header(folder / MLX_FILE)
    parts: dict[str, dict[str, Shape]] = {}
    for name, tensor in header.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _MLX_LEAVES or not module:
            raise _refused(f"{MLX_FILE}: {name} is not an adapter tensor (lora_a, lora_b or m)")
        parts.setdefault(module, {})[leaf] = tensor.shape
    layers = {module: _mlx_layer(module, found, dora=kind == "dora") for module, found in parts.items()}
    has_scale = isinstance(parameters.get("scale"), int | float)
    return AdapterFacts(
        _grouped(layers),
        nbytes=sum(tensor.nbytes for tensor in header.values()),
        keys=tuple(map(str, keys)) if isinstance(keys, list) else (),
        last_layers=last,
        no_scale="" if has_scale else "adapter_config.json: lora_parameters.scale is missing",
        base=str(config.get("model") or ""),
    )


def _mlx_layer(module: str, parts: Mapping[str, Shape], *, dora: bool) -> tuple[Shape, Shape, Shape | None]:
    for leaf in _MLX_LEAVES[: 3 if dora else 2]:
        if leaf not in parts:
            raise _refused(f"{MLX_FILE}: {module}.{leaf} is missing")
    if not dora and "m" in parts:
        raise _refused(f"{MLX_FILE} has {module}.m, but adapter_config.json does not say dora")
    a, b = parts["lora_a"], parts["lora_b"]
    if len(a) == 3:
        a, b = _swapped(a), _swapped(b)
    return a, b, parts.get("m")


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape


# ------------------------------------------------------------------ PEFT


def _read_peft(folder: Path, config: Mapping[str, Any]) -> AdapterFacts:
    _require_supported(config)
    if not (folder / PEFT_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise _refused("adapter_model.bin is a pickle, which is not loaded", "save it as safetensors")
    header, _ = read_header(folder / PEFT_FILE)
    parts: dict[str, dict[str, Shape]] = {}
    for name, tensor in header.items():
        match = _PEFT_NAME.match(name.removeprefix(_PEFT_PREFIX))
        if match is None:
            raise _refused(f"{PEFT_FILE}: {name} is not a LoRA tensor of a linear layer")
        parts.setdefault(match["module"], {})[match["part"]] = tensor.shape
    dora = bool(config.get("use_dora"))
    layers = {module: _peft_layer(module, found, dora=dora) for module, found in parts.items()}
    return AdapterFacts(
        _grouped(layers),
        nbytes=sum(tensor.nbytes for tensor in header.values()),
        no_scale=next(_scale_troubles(layers, config), ""),
        base=str(config.get("base_model_name_or_path") or ""),
    )


def _require_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise _refused(f"peft_type {kind} is not supported; only LORA is")
    if config.get("modules_to_save"):
        raise _refused(f"modules_to_save ({config['modules_to_save']}) replaces whole layers of the base model")
    if config.get("bias", "none") != "none":
        raise _refused(f"bias {config['bias']!r} changes the base model's biases")
    for key in _PEFT_REFUSED:
        if config.get(key):
            raise _refused(f"adapter_config.json sets {key}, which is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise _refused(f"init_lora_weights {start!r} also changed the base model", "convert it to plain LoRA first")


def _peft_layer(module: str, parts: Mapping[str, Shape], *, dora: bool) -> tuple[Shape, Shape, Shape | None]:
    for name in ("lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ())):
        if name not in parts:
            raise _refused(f"{PEFT_FILE}: {_PEFT_PREFIX}{module}.{name} is missing")
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    if len(a) != 2 or len(b) != 2:
        raise _refused(f"{PEFT_FILE}: {_PEFT_PREFIX}{module} does not hold matrices")
    return _swapped(a), _swapped(b), None if magnitude is None else (math.prod(magnitude),)


def _scale_troubles(
    layers: Mapping[str, tuple[Shape, Shape, Shape | None]], config: Mapping[str, Any]
) -> Iterator[str]:
    """Why lora_alpha / r cannot be had."""
    for module, (a, _, _) in layers.items():
        alpha = _by_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha"))
        declared = _by_pattern(module, config.get("rank_pattern"), config.get("r"))
        if not isinstance(alpha, int | float):
            yield "adapter_config.json: lora_alpha is missing"
        if declared != a[-1]:
            where = f"{PEFT_FILE}: {_PEFT_PREFIX}{module}.lora_A"
            yield f"{where} has rank {a[-1]}, adapter_config.json says {declared}"


def _by_pattern(module: str, patterns: Any, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the module's path."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default
