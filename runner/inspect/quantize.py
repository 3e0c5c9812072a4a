"""Whether a source can be quantised as a manifest asks, and what it then is.

`quantized` foretells what `runner.engine.convert` writes, group by group of tensors, so that whatever is reckoned of
a folder (memory, layers, adapters) can be reckoned of one that is not there yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from runner.inspect.config import Config, Packing
from runner.inspect.layers import is_own_gate
from runner.inspect.model import ModelFacts
from runner.inspect.tensors import FLOATING, Group, at_block

_MODES: Final[Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Bits and group sizes that `mx.quantize` has for each mode."""

_USUAL: Final = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Those that mlx_lm.convert takes where nothing is said."""

_ITEM: Final = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}

_PRECISE: Final[Mapping[str, tuple[str, ...]]] = {
    "mlp.gate": ("Klear", "kimi_linear", "kimi_k3", "mellum", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_5"),
    "shared_expert_gate": ("qwen3_next", "qwen3_5"),
    "router.gate": ("afmoe",),
    "mlp.gate.gate_proj": ("bailing_hybrid", "bailing_moe", "bailing_moe_linear"),
    "router.proj": ("gemma4", "gemma4_text"),
    "router": ("gpt_oss", "jamba"),
    "router.layer": ("granitemoe", "granitemoehybrid"),
    "self_attn.o_proj": ("granite", "granitemoe"),
    "mlp.down_proj": ("granite", "granitemoe"),
    "lm_head": ("granite", "granitemoe"),
    "mlp.gate.proj": ("laguna",),
    "feed_forward.gate": ("lfm2_moe",),
    "classifier": ("longcat_flash", "longcat_flash_ngram"),
    "block_sparse_moe.gate": ("minimax", "minimax_m3_vl"),
    "mlp.gate.gate": ("step3p5",),
}
"""Layers that mlx-lm 0.32 keeps at 8 bits in groups of 64 by itself (`quant_predicate` of its models), and where."""


_LEFT: Final[Mapping[str, tuple[str, ...]]] = {
    "bailing_hybrid": ("attention.embed_q", "attention.unembed_out"),
    "bailing_moe_v3": (
        "word_embeddings",
        "lm_head",
        "attention.q_a_proj",
        "attention.q_b_proj",
        "attention.kv_a_proj_with_mqa",
        "attention.embed_q",
        "attention.unembed_out",
        "attention.b_proj",
    ),
    "spark2_5": ("self_attn.g_proj",),
}
"""Layers that mlx-lm 0.32 does not quantise unless a rule says so."""

_NEVER: Final = frozenset({"afm7"})
"""Architectures with layers of their own kind, which mlx-lm cannot quantise."""


class Wanted(NamedTuple):
    """What a manifest asks for: the packing of all, and of layers whose path matches a pattern, the first that does;
    None leaves them as they are."""

    packing: Packing
    layers: Mapping[str, Packing | None] = {}


class Misfit(NamedTuple):
    """Why not. `keys` lead within `quantization` to what is at fault, and are empty where it is all of it."""

    keys: tuple[str, ...]
    message: str
    hint: str


def packing_of(bits: int | None, group_size: int | None, mode: str) -> Packing:
    """What is not said is as mlx_lm.convert has it for the mode."""
    usual = _USUAL[mode]
    return Packing(bits or usual[0], group_size or usual[1], mode)


def matches(pattern: str, path: str) -> bool:
    """Whether a layer's path is meant; a leading `*.` stands for nothing too. As `runner.engine.convert` has it."""
    return fnmatchcase(path, pattern) or (pattern.startswith("*.") and fnmatchcase(path, pattern[2:]))


def misfit(model: ModelFacts, wanted: Wanted) -> Misfit | None:
    """None where at least most of the model can be quantised so."""
    if (found := model.config.quantization) is not None:
        if is_already(model, wanted):
            return None
        how = f"{found.bits} bits in groups of {found.group_size}"
        return Misfit((), f"the source is quantised already, to {how}", "remove quantization, or take the original")
    if tool := model.config.quantized_elsewhere:
        return Misfit((), f"the source is packed by {tool} already", "remove quantization, or take the original")
    if model.config.architecture in _NEVER:
        return Misfit((), f"mlx_lm cannot quantise {model.config.model_type} models", "remove quantization")
    for keys, packing in (((), wanted.packing), *((("layers", name), rule) for name, rule in wanted.layers.items())):
        if packing is not None and (wrong := _impossible(packing)) is not None:
            return wrong._replace(keys=(*keys, *wrong.keys))
    return _widths(model, wanted.packing) or _unmatched(model, wanted)


def is_already(model: ModelFacts, wanted: Wanted) -> bool:
    """Whether the source is quantised in just this way, so that there is nothing to do."""
    return model.config.quantization == wanted.packing and not wanted.layers


def _impossible(packing: Packing) -> Misfit | None:
    bits, sizes = _MODES.get(packing.mode, ((), ()))
    if packing.bits not in bits:
        return Misfit(("bits",), f"{packing.mode} has no {packing.bits} bits", f"it has {_listed(bits)}")
    if packing.group_size not in sizes:
        message = f"{packing.mode} has no groups of {packing.group_size}"
        return Misfit(("group_size",), message, f"it has groups of {_listed(sizes)}")
    return None


def _widths(model: ModelFacts, packing: Packing) -> Misfit | None:
    _, sizes = _MODES[packing.mode]
    layers = [group for group in model.tensors if _quantizable(group, model.config)]
    odd = [group for group in layers if group.shape[-1] % packing.group_size]
    if sum(group.values for group in odd) * 2 <= sum(group.values for group in layers):
        return None
    widths = sorted({group.shape[-1] for group in odd})
    fitting = [size for size in reversed(sizes) if not any(width % size for width in widths)]
    hint = f"give group_size: {fitting[0]}" if fitting else "leave it as it is"
    message = f"most layers have {_listed(widths)} inputs, which groups of {packing.group_size} do not divide"
    return Misfit(("group_size",), message, hint)


def _unmatched(model: ModelFacts, wanted: Wanted) -> Misfit | None:
    """A rule that would silently do nothing, in a folder whose tensors have the names of the model's layers."""
    if not wanted.layers or model.written_by != "mlx":
        return None
    paths = [path for group in model.tensors if _quantizable(group, model.config) for path, _ in _layers(group)]
    for pattern in wanted.layers:
        if not any(matches(pattern, path) for path in paths):
            hint = f"layers are called as {paths[0]}" if paths else "remove it"
            return Misfit(("layers", pattern), "matches no layer that can be quantised", hint)
    return None


# ------------------------------------------------------------------ what it is afterwards


def quantized(model: ModelFacts, wanted: Wanted) -> ModelFacts:
    """The facts of the model once it is quantised so. Layers whose inputs the groups do not divide stay as they are."""
    groups: list[Group] = []
    own: dict[str, Any] = {}
    for group in model.tensors:
        if not _quantizable(group, model.config):
            groups.append(group)
            continue
        shares: dict[Packing | None, list[int]] = {}
        for path, block in _layers(group):
            packing = _decided(path, group, model.config, wanted)
            shares.setdefault(packing, []).append(block)
            if packing != wanted.packing:
                own[path] = False if packing is None else packing._asdict()
        for packing, blocks in shares.items():
            part = _share(group, blocks)
            groups += [part] if packing is None else _packed(part, packing)
    config = Config({**model.config.top, "quantization": {**wanted.packing._asdict(), **own}}, model.config.where)
    return model._replace(config=config, tensors=tuple(groups))


def cast(model: ModelFacts, dtype: str) -> ModelFacts:
    """The facts of the model with everything that is floating in `dtype`, as mlx names it."""
    name, size = _ITEM[dtype]
    groups = (
        group._replace(dtype=name, nbytes=group.values * size) if group.dtype in FLOATING else group
        for group in model.tensors
    )
    return model._replace(tensors=tuple(groups))


def converted_dtype(config: Config, asked: str) -> str:
    """What is not quantised is written in: as asked, else as config.json says, which mlx_lm.convert heeds; "" for as it
    is."""
    if asked:
        return asked
    nested = config.top.get("text_config")
    stated = config.top.get("torch_dtype") or (nested.get("dtype") if isinstance(nested, Mapping) else None)
    return stated if stated in _ITEM else ""


def _layers(group: Group) -> Iterator[tuple[str, int]]:
    """Path and block of each layer that a group's weights are of; block -1 where there are none."""
    name = group.name.removesuffix(".weight")
    if not group.blocks:
        yield name, -1
        return
    for block in range(group.blocks.bit_length()):
        if group.blocks >> block & 1:
            yield at_block(name, block).replace("*", "0"), block


def _decided(path: str, group: Group, config: Config, wanted: Wanted) -> Packing | None:
    if group.shape[-1] % wanted.packing.group_size:
        return None  # whatever rules say, as in mlx_lm.convert
    packing: Packing | None = wanted.packing
    if path.endswith(_LEFT.get(config.architecture, ())):
        packing = None
    elif any(path.endswith(suffix) for suffix, kinds in _PRECISE.items() if config.architecture in kinds):
        packing = Packing(8, 64)
    for pattern, rule in wanted.layers.items():
        if matches(pattern, path):
            packing = rule
            break
    return None if packing is None or group.shape[-1] % packing.group_size else packing


def _share(group: Group, blocks: list[int]) -> Group:
    """The part of a group that is of some of its blocks."""
    if blocks == [-1] or len(blocks) == group.blocks.bit_count():
        return group
    members = group.members * len(blocks) // group.blocks.bit_count()
    mask = sum(1 << block for block in blocks)
    return group._replace(blocks=mask, members=members, nbytes=group.nbytes // group.members * members)


def _packed(group: Group, packing: Packing) -> list[Group]:
    """A weight as it is once it is packed: 32-bit words, and scales (of affine modes, biases too)."""
    *outer, inputs = group.shape
    words = (*outer, inputs * packing.bits // 32)
    scales = (*outer, inputs // packing.group_size)
    affine = packing.mode == "affine"
    itemsize = group.nbytes // max(1, group.values)
    name = group.name.removesuffix("weight")
    number, count = group.members, math.prod(scales)
    small = group._replace(
        name=f"{name}scales",
        dtype=group.dtype if affine else "U8",
        shape=scales,
        nbytes=count * number * (itemsize if affine else 1),
    )
    found = [group._replace(dtype="U32", shape=words, nbytes=math.prod(words) * number * 4), small]
    return [*found, small._replace(name=f"{name}biases")] if affine else found


def _quantizable(group: Group, config: Config) -> bool:
    """Whether upstream's `nn.quantize` takes the layer: linear layers, layers of experts, and embeddings."""
    path = group.name.removesuffix(".weight")
    kind = path.rpartition(".")[2]
    if path == group.name or len(group.shape) not in (2, 3) or "conv" in kind or is_own_gate(path, config):
        return False
    return group.dtype in FLOATING and math.prod(group.shape) > 0 and "norm" not in kind


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
