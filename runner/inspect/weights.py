"""What of a model's files ends up in memory, and how large.

Upstream leaves out what the text model does not use (vision towers, extra heads), casts what is asked for, and unpacks
FP8. The sum of the rest, by the headers, is what `mx.get_active_memory` says after loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from runner.inspect.config import Config
from runner.inspect.tensors import FLOATING, Group, Tensors

_LEFT_OUT: Final = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|audio_tower|embed_vision|embed_audio"
    r"|mtp)\.|(^|\.)(rotary_emb|rope)\.(inv_freq|freqs)$|(_scale_inv|\.activation_scale)$|\.attn\.(masked_)?bias$"
)
"""What no text model of mlx-lm keeps: other modalities, extra heads, tables that are computed, scales of FP8."""

_HEAD: Final = re.compile(r"(^|\.)lm_head\.")
_OWN_HEAD: Final = frozenset(
    ["gemma3", "glm4_moe", "glm4_moe_lite", "helium", "kimi_k25", "qwen2_moe", "solar_open", "step3p5"]
)
"""Architectures that keep a head which the files have, whatever the configuration says of it being tied."""

_BLOCK: Final = re.compile(r"(^|\.)layers\.\*\.")
_ITEM: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FP8: Final = frozenset({"F8_E4M3", "F8_E5M2"})
_NORM: Final = re.compile(r"norm\w*\.weight$|(^|\.)ln_\w+\.weight$")


def kept(tensors: Tensors, config: Config) -> tuple[Group, ...]:
    """The tensors that the model keeps."""
    tied = config.get("tie_word_embeddings") is True and config.architecture not in _OWN_HEAD
    beyond = -1 << config.layers if config.get("num_hidden_layers") is not None else 0
    found = []
    for group in tensors.groups:
        if _LEFT_OUT.search(group.name) or (tied and _HEAD.search(group.name)):
            continue
        extra = (group.blocks & beyond).bit_count() if _BLOCK.search(group.name) else 0
        if extra:  # layers that predict further tokens come after the model's own
            share = 1 - extra / group.blocks.bit_count()
            members = round(group.members * share)
            group = group._replace(blocks=group.blocks & ~beyond, members=members, nbytes=round(group.nbytes * share))
            if not members:
                continue
        found.append(group)
    return tuple(found)


def resident_bytes(groups: Iterable[Group], *, float32: bool) -> int:
    """Bytes in memory. `float32`: as on the CPU, where the engine casts whatever is floating."""
    total = 0
    for group in groups:
        if group.dtype in _FP8:
            total += group.values * (4 if float32 else 2)
        elif float32 and group.dtype in FLOATING:
            total += group.values * 4
        else:
            total += group.nbytes
    return total


def activation_itemsize(groups: Iterable[Group], *, float32: bool) -> int:
    """Bytes of a value that the model computes: the type of its norms, which quantisation leaves alone."""
    if float32:
        return 4
    floating = [group for group in groups if group.dtype in FLOATING]
    norms = [group for group in floating if _NORM.search(group.name)] or floating
    return max((_ITEM[group.dtype] for group in norms), default=2)
