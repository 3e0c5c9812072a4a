"""Attention with the query heads of a key head as one matrix."""

from __future__ import annotations

import mlx.core as mx

from runner.engine.kv.masks import Mask, masked


def grouped(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """[rows, heads, tokens, width] of queries of that shape. `mask` is an array or None."""
    rows, heads, tokens, width = queries.shape
    groups = keys.shape[1]
    joined = (queries * scale).reshape(rows, groups, heads // groups * tokens, width)
    scores = joined @ keys.swapaxes(-1, -2)
    if isinstance(mask, mx.array):
        scores = masked(scores, mask, (rows, groups, heads // groups, tokens))
    attended = mx.softmax(scores, axis=-1, precise=True) @ values
    return attended.reshape(rows, heads, tokens, values.shape[-1])
