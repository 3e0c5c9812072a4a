"""The attention that a step computes, in place of upstream's call of `mx.fast.scaled_dot_product_attention`.

The query heads that share a key head (grouped-query attention) are, with a few new tokens, one small matrix: what is
one product a query head in upstream's order is one a key head here. On the CPU that halves the time; on CUDA, where
MLX's fused kernels take no mask for single tokens, and compile one for each new length where they do, it reads the keys
once and not once a query head. Metal's kernel does both by itself.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models import base

from runner.engine.kv import blocks, quantised
from runner.engine.kv.grouped import grouped
from runner.engine.kv.masks import FEW, Mask
from runner.engine.kv.quantised import Quantised
from runner.engine.kv.rotary import after, rotated
from runner.engine.kv.thresholded import Both, Thresholded
from runner.engine.kv.unwritten import Unwritten

_ON_GPU: Final = mx.default_device() == mx.Device(mx.gpu)
_NAME: Final = "scaled_dot_product_attention"


def install(model: Any) -> None:
    """Let the modules that `model` is made of call `attend`. Upstream has no other place for it."""
    for name in {type(module).__module__ for module in model.modules()}:
        if getattr(sys.modules.get(name), _NAME, None) is base.scaled_dot_product_attention:
            setattr(sys.modules[name], _NAME, attend)


def attend(
    queries: Any,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """[rows, heads, tokens, width]; arguments and result are those of mlx_lm.models.base's function of this name.

    Keys and values may be `Unwritten` as well, or `Both` of a `Thresholded` cache, and queries `Unrotated`.
    """
    if isinstance(keys, Both):
        return _across(queries, keys, cache, scale, mask, sinks)
    if isinstance(cache, Thresholded):
        cache = cache.used
    if isinstance(keys, Unwritten) and keys is values:
        attended = keys.attend(queries, scale, mask, sinks)
        if attended is not None:
            return attended
        keys, values = keys.fetch()
    queries = rotated(queries)
    if isinstance(cache, Quantised):
        return quantised.attend(queries, keys, values, cache.quantisation, scale, mask, sinks)
    heads, tokens = queries.shape[1:3]
    few = tokens <= FEW and sinks is None and keys.shape[1] < heads
    if few and not mx.metal.is_available() and (isinstance(mask, mx.array) or (tokens == 1 and not _ON_GPU)):
        return grouped(queries, keys, values, scale, mask, cache)
    in_blocks = blocks.attend(queries, keys, values, scale, mask, cache) if sinks is None else None
    if in_blocks is not None:
        return in_blocks
    result: mx.array = base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return result


def _across(queries: Any, both: Both, cache: Thresholded, scale: float, mask: Mask, sinks: mx.array | None) -> mx.array:
    """What queries see of which some are before the cache's threshold, and some beyond it.

    All see both, and each has that of its side: rows are not taken apart, so that a graph does for any.
    """
    plain, packed = cache.caches
    seen = attend(queries, *both.plain, plain, scale, mask, sinks)
    if isinstance(both.packed[0], Unwritten):
        # Two launches at once would leave what their blocks have for each other at the same places.
        queries = after(queries, seen)
    attended = attend(queries, *both.packed, packed, scale, cache.packed_mask(mask), sinks)
    return mx.where(cache.sees_plain(seen.shape), seen, attended)
