"""Whether a source can be quantised as a manifest asks, and what it then takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from runner.inspect.config import Packing
from runner.inspect.model import ModelFacts
from runner.inspect.tensors import FLOATING, Group
from runner.inspect.weights import resident_bytes

_MODES: Final[Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""Bits and group sizes that `mx.quantize` has for each mode."""


class Misfit(NamedTuple):
    """Why not. `key` is the key of `quantization` that is at fault, empty where it is all of it."""

    key: str
    message: str
    hint: str


def misfit(model: ModelFacts, wanted: Packing) -> Misfit | None:
    """None where at least most of the model can be quantised so."""
    if (found := model.config.quantization) is not None:
        how = f"{found.bits} bits in groups of {found.group_size}"
        return Misfit("", f"the source is quantised already, to {how}", "remove quantization, or take the original")
    if tool := model.config.quantized_elsewhere:
        return Misfit("", f"the source is packed by {tool} already", "remove quantization, or take the original")
    bits, sizes = _MODES.get(wanted.mode, ((), ()))
    if wanted.bits not in bits:
        return Misfit("bits", f"{wanted.mode} has no {wanted.bits} bits", f"it has {_listed(bits)}")
    if wanted.group_size not in sizes:
        return Misfit(
            "group_size", f"{wanted.mode} has no groups of {wanted.group_size}", f"it has groups of {_listed(sizes)}"
        )
    layers = [group for group in model.tensors if _quantizable(group)]
    odd = [group for group in layers if group.shape[-1] % wanted.group_size]
    if sum(group.values for group in odd) * 2 > sum(group.values for group in layers):
        widths = sorted({group.shape[-1] for group in odd})
        fitting = [size for size in reversed(sizes) if not any(width % size for width in widths)]
        hint = f"give group_size: {fitting[0]}" if fitting else "leave it as it is"
        message = f"most layers have {_listed(widths)} inputs, which groups of {wanted.group_size} do not divide"
        return Misfit("group_size", message, hint)
    return None


def quantized_bytes(model: ModelFacts, wanted: Packing, *, float32: bool) -> int:
    """Bytes of the weights in memory once quantised: layers whose inputs the groups do not divide stay as they are."""
    done = [group for group in model.tensors if _quantizable(group) and not group.shape[-1] % wanted.group_size]
    rest = resident_bytes((group for group in model.tensors if group not in done), float32=float32)
    return rest + sum(_packed_bytes(group, wanted, float32=float32) for group in done)


def _packed_bytes(group: Group, wanted: Packing, *, float32: bool) -> int:
    scales = group.values // wanted.group_size
    if wanted.mode == "affine":  # a scale and a bias of the weights' type
        itemsize = 4 if float32 else group.nbytes // max(1, group.values)
        return group.values * wanted.bits // 8 + scales * 2 * itemsize
    return group.values * wanted.bits // 8 + scales


def _quantizable(group: Group) -> bool:
    """Whether upstream's `nn.quantize` takes the layer: linear layers, layers of experts, and embeddings."""
    is_matrix = len(group.shape) in (2, 3) and group.name.endswith(".weight") and "conv" not in group.name
    return is_matrix and group.dtype in FLOATING and math.prod(group.shape) > 0 and "norm" not in group.name


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
