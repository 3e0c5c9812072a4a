"""Which linear layers a model has, by the tensors it keeps: what an adapter can be checked against.

Names are those of mlx-lm's modules. Folders that mlx-lm has written have them; of others the few renamings are applied
that its loaders have in common, and where an architecture may have more of its own, `certain` is False.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from runner.inspect.config import Config
from runner.inspect.tensors import Group, at_block, first_block

_EMBEDDING: Final = re.compile(r"(^|\.)(embed_tokens\w*|embed_in|wte|wpe|tok_embeddings|\w*embeddings?|embed)$")
_NORM: Final = re.compile(r"norm$")
_EXPERTS: Final = re.compile(r"(^|\.)(switch_mlp|switch_glu|experts)\.\w+$")
_SINGLE_EXPERT: Final = re.compile(r"^(?P<block>.*)\.experts\.\*\.(?P<name>\w+)$")
_MIXTRAL: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_OWN_GATE: Final = """
    bailing_moe_v3 deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa
    kimi_k25 kimi_vl mimo_v2_flash solar_open
"""
"""Architectures whose router is a class of its own, not a linear layer."""

_AS_ON_THE_HUB: Final = """
    apertus cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text granite helium hunyuan_v1_dense internlm3 lfm2
    llama ministral3 mixtral olmo2 olmo3 olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
"""
"""Architectures whose tensors have the same names on the hub as in mlx-lm, once experts are put together."""


class Layer(NamedTuple):
    """Alike linear layers: a path with `*` for the block's number, and a bit for each block that has one.

    `packing` stands for how the weights are stored: layers of different packings cannot be computed as one.
    """

    path: str
    blocks: int
    experts: tuple[int, ...]
    inputs: int
    outputs: int
    packing: tuple[object, ...] = ()
    bias: bool = False


class Layers(NamedTuple):
    """`refused` says of other modules (by path with `*`) what they are. `depth` is how many blocks there are."""

    linear: tuple[Layer, ...]
    refused: Mapping[str, str]
    depth: int
    certain: bool


def linear_layers(groups: Iterable[Group], config: Config, written_by: str = "") -> Layers:
    """Raises BadFolder where config.json does not say how many blocks there are."""
    groups = tuple(groups)
    scales: dict[str, list[Group]] = {}
    biased = {g.name.removesuffix(".bias") for g in groups if g.name.endswith(".bias")}
    for group in groups:
        if group.name.endswith(".scales"):
            scales.setdefault(group.name.removesuffix(".scales"), []).append(group)
    certain = written_by == "mlx" or "quantization" in config.data or config.architecture in _AS_ON_THE_HUB.split()
    linear: list[Layer] = []
    refused: dict[str, str] = {}
    for group in groups:
        path, _, leaf = group.name.rpartition(".")
        if leaf != "weight" or len(group.shape) not in (2, 3):
            continue
        if (why := _no_linear_layer(path, group, config)) is not None:
            refused[path] = why
            continue
        for blocks, inputs in _inputs(path, group, scales.get(path, ()), config):
            layer = _layer(path, group, blocks, inputs)
            certain = certain and layer is not None and inputs > 0
            if layer is not None:
                packing = (group.dtype, *(group.shape[-1:] if path in scales else ()))
                linear.append(layer._replace(packing=packing, bias=path in biased))
    return Layers(tuple(linear), refused, config.layers, certain and config.architecture != "dbrx")


def _layer(path: str, group: Group, blocks: int, inputs: int) -> Layer | None:
    """None where a second number in the name is not that of an expert."""
    if (single := _SINGLE_EXPERT.match(path)) is not None:
        name = _MIXTRAL.get(single["name"], single["name"])
        experts = (group.members // max(1, group.blocks.bit_count()),)
        return Layer(f"{single['block']}.switch_mlp.{name}", blocks, experts, inputs, group.shape[0])
    return None if path.count("*") > 1 else Layer(path, blocks, group.shape[:-2], inputs, group.shape[-2])


def _no_linear_layer(path: str, group: Group, config: Config) -> str | None:
    """What else a module with a weight of two or three axes is."""
    if _EMBEDDING.search(path):
        return "an embedding"
    if _NORM.search(path):
        return "a norm"
    if len(group.shape) == 3 and not _EXPERTS.search(path):
        return "no linear layer"
    return "a router" if is_own_gate(path, config) else None


def is_own_gate(path: str, config: Config) -> bool:
    """Whether a module with a weight is a router of its architecture's own class, and so no linear layer."""
    return path.endswith(".mlp.gate") and config.architecture in _OWN_GATE.split()


def _inputs(path: str, weight: Group, scales: Iterable[Group], config: Config) -> Iterator[tuple[int, int]]:
    """Blocks of a weight's layers and how many inputs they have; 0 where its packing does not tell."""
    plain = weight.blocks
    for group in scales:
        common = weight.blocks & group.blocks
        if common or weight.blocks == group.blocks:
            packing = config.packing(at_block(path, first_block(common)))
            inputs = group.shape[-1] * packing.group_size
            yield common, inputs if inputs * packing.bits == weight.shape[-1] * 32 else 0
            plain &= ~common
            if not weight.blocks:
                return
    if plain or not weight.blocks:
        yield plain, weight.shape[-1]
