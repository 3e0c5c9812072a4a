"""Attention to packed keys and values that are unpacked for it, a part at a time where that would be much memory.

What is unpacked lives for one layer's attention. A part is some rows, or some key heads of a row: none sees another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import mlx.core as mx

from runner.engine.kv import blocks
from runner.engine.kv.grouped import grouped
from runner.engine.kv.masks import FEW, Mask
from runner.engine.kv.widened import Packed

_MOST: Final = 1 << 28
"""Bytes of keys and values that are unpacked at once."""


def attend(
    queries: mx.array,
    keys: Packed,
    values: Packed,
    unpack: Callable[[Packed], mx.array],
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """[rows, heads, tokens, width] of queries of that shape; keys and values are packed from [rows, groups, …]."""
    rows, heads, _, width = queries.shape
    groups, places = keys[0].shape[1:3]
    shared = heads // groups
    parts = list(_parts(rows, groups, 2 * places * width * queries.dtype.size))
    if len(parts) == 1:
        return _plain(queries, unpack(keys), unpack(values), scale, mask, sinks)
    done: list[mx.array] = []
    for of_rows, of_groups in parts:
        of_heads = slice(of_groups.start * shared, of_groups.stop * shared)
        held = [array[of_rows, of_groups] for array in (*keys, *values)]
        if done:
            # Else MLX might unpack all parts before it attends to one.
            held = mx.depends(held, done[-1])
        k, v = (unpack((packed, scales, biases)) for packed, scales, biases in (held[:3], held[3:]))
        own = None if sinks is None else sinks[of_heads]
        done.append(_plain(queries[of_rows, of_heads], k, v, scale, _cut(mask, of_rows, of_heads), own))
    lines = sum(of_rows.start == 0 for of_rows, _ in parts)
    return mx.concatenate([mx.concatenate(done[i : i + lines], axis=1) for i in range(0, len(done), lines)])


def _parts(rows: int, groups: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Which rows and key heads go together, where one of each takes so many bytes: rows first, then heads."""
    together = max(1, _MOST // (groups * each))
    heads = groups if groups * each <= _MOST else max(1, _MOST // each)
    for row in range(0, rows, together):
        for group in range(0, groups, heads):
            yield slice(row, min(row + together, rows)), slice(group, min(group + heads, groups))


def _cut(mask: Mask, rows: slice, heads: slice) -> Mask:
    if not isinstance(mask, mx.array) or mask.ndim < 3:
        return mask
    if mask.ndim > 3 and mask.shape[0] > 1:
        mask = mask[rows]
    return mask[..., heads, :, :] if mask.shape[-3] > 1 else mask


def _plain(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask, sinks: mx.array | None
) -> mx.array:
    few = queries.shape[2] <= FEW and sinks is None and keys.shape[1] < queries.shape[1]
    if few and isinstance(mask, mx.array):
        return grouped(queries, keys, values, scale, mask)
    in_blocks = blocks.attend(queries, keys, values, scale, mask) if sinks is None else None
    if in_blocks is not None:
        return in_blocks
    attended: mx.array = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=mask, sinks=sinks
    )
    return attended
