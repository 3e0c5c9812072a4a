"""Attention with the query heads of a key head as one matrix."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from runner.engine import exponentials
from runner.engine.kv.masks import ON_CPU, Mask, masked


def grouped(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask, cache: Any = None
) -> mx.array:
    """[rows, heads, tokens, width] of queries of that shape. `mask` is an array or None, `cache` the layer's.

    On the CPU a mask that the layer has made is added by the product itself, as numbers.
    """
    rows, heads, tokens, width = queries.shape
    groups = keys.shape[1]
    shape = rows, groups, heads // groups, tokens
    lines = (rows, groups, heads // groups * tokens, width)
    added = _added(queries, mask, shape, cache) if isinstance(mask, mx.array) else None
    if added is not None:
        scores = mx.addmm(added, queries.reshape(lines), keys.swapaxes(-1, -2), alpha=scale)
    else:
        scaled = queries if scale == 1.0 else queries * scale
        scores = scaled.reshape(lines) @ keys.swapaxes(-1, -2)
        if isinstance(mask, mx.array):
            scores = masked(scores, mask, shape)
    attended = exponentials.weighted(scores, lambda weights: weights @ values)
    return attended.reshape(rows, heads, tokens, values.shape[-1])


def _added(queries: mx.array, mask: mx.array, shape: tuple[int, int, int, int], cache: Any) -> mx.array | None:
    """A mask as what the product of queries and keys is added to; None where that is not to be had once a call."""
    if not ON_CPU or queries.dtype != mx.float32 or not hasattr(cache, "added"):
        return None
    made: mx.array | None = cache.added(mask, shape)
    return made
