"""Upstream's usual attention of a block, whose decode steps take nothing apart.

Upstream's attention divides what the joined product of queries, keys and values gives, turns each part around, and
turns back what was attended to: twelve views a layer, which compute nothing, and take the host together as long as the
launches between them. Where the layer's cache has a launch that takes the product as it is (`Straight.joined`), there
are none. All other calls are upstream's.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.joined import JoinedLayers, joined_of

_PARTS: Final = ("q_proj", "k_proj", "v_proj")


class _WholeAttention(nn.Module):  # type: ignore[misc]
    """An attention whose projections are one product, `together`, of so many heads, key heads, and values a head."""

    together: JoinedLayers
    form: tuple[int, int, int]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x is [rows, tokens, width]."""
        joined = getattr(cache, "joined", None)
        attend = joined and joined(self.form, x.dtype, self.rope, self.scale, mask)
        whole: mx.array = (
            super().__call__(x, mask, cache) if attend is None else self["o_proj"](attend(self.together.layer(x)))
        )
        return whole


def install(model: Any) -> int:
    """Let the model's attentions be such, those that compute what upstream's usual one does. Returns how many are.

    To be called when siblings are joined, before any layer is wrapped.
    """
    count = 0
    for module in list(model.modules()):
        together = _together(module)
        if together is None:
            continue
        form = module.n_heads, module.n_kv_heads, together.outputs[0] // module.n_heads
        if together.outputs != [form[0] * form[2], *[form[1] * form[2]] * 2] or not _is_usual(module, form):
            continue
        whole: Any = type(module)
        module.__class__ = _derived(whole)
        object.__setattr__(module, "together", together)
        object.__setattr__(module, "form", form)
        count += 1
    return count


def _together(module: Any) -> JoinedLayers | None:
    """What a module's projections are joined in, if it has the parts of upstream's usual attention and no more."""
    if isinstance(module, _WholeAttention) or set(module.children()) != {*_PARTS, "o_proj", "rope"}:
        return None
    if [*signature(type(module).__call__).parameters] != ["self", "x", "mask", "cache"]:
        return None
    if not all(isinstance(getattr(module, name, None), int) for name in ("n_heads", "n_kv_heads")):
        return None
    places = [joined_of(module[name]) for name in _PARTS]
    groups = {id(place[0]) for place in places if place is not None}
    whole = None not in places and len(groups) == 1 and isinstance(getattr(module, "scale", None), float)
    return places[0][0] if whole and places[0] is not None else None


def _is_usual(module: Any, form: tuple[int, int, int]) -> bool:
    """Whether it computes what upstream's usual attention does, to the bit."""
    heads, groups, width = form
    try:
        x = mx.random.normal((1, 2, _inputs(module.q_proj)), key=mx.random.key(0)).astype(_dtype(module.o_proj))
        parts = [module[name](x) for name in _PARTS]
        queries, keys, values = (
            part.reshape(1, 2, count, width).swapaxes(1, 2)
            for part, count in zip(parts, (heads, groups, groups), strict=True)
        )
        attended = mx.fast.scaled_dot_product_attention(
            module.rope(queries), module.rope(keys), values, scale=module.scale, mask=None
        )
        usual = module.o_proj(attended.swapaxes(1, 2).reshape(1, 2, -1))
        return bool(mx.array_equal(module(x, None, None), usual, equal_nan=True).item())
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return False
    finally:
        module.q_proj.place[0].forget()


def _inputs(layer: Any) -> int:
    width: int = layer.weight.shape[1]
    return width * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else width


def _dtype(layer: Any) -> mx.Dtype:
    weight: mx.array = layer.scales if isinstance(layer, nn.QuantizedLinear) else layer.weight
    return weight.dtype


@cache
def _derived(kind: Any) -> type[Any]:
    # Its module is upstream's, since that is where others look for what it calls.
    return type(f"Whole{kind.__name__}", (_WholeAttention, kind), {"__module__": kind.__module__})
