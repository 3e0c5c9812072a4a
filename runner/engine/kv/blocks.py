"""Attention of many tokens where MLX computes exponentials one by one (`exponentials.py`), by blocks of queries.

MLX's own is there a product, a mask, a softmax and a product of all queries with all keys. A block leaves out the keys
that come after it, half of all in a prompt, and its scores are few enough to be near the processor from one operation
to the next.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import mlx.core as mx

from runner.engine import exponentials
from runner.engine.kv import masks
from runner.engine.kv.masks import Mask

_BLOCK: Final = 64
"""Queries. With 32 and 128 a prompt's attention takes 3 to 10 % longer, with all at once nearly twice as long."""


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask, layer: Any = None
) -> mx.array | None:
    """[rows, heads, tokens, width] of queries of that shape; None where that is left to MLX.

    `layer` is the layer's cache, which may know the mask.
    """
    rows, heads, tokens, width = queries.shape
    groups, reach = keys.shape[1:3]
    if not exponentials.pays(rows * heads * tokens * reach, queries, keys, values):
        return None
    shape = rows, groups, heads // groups
    hidden = _hidden(mask, shape, tokens, reach, layer)
    if hidden is None and mask is not None:
        return None
    ordered = isinstance(mask, str)
    grouped = queries.reshape(*shape, tokens, width)
    keys, values = keys[:, :, None].swapaxes(-1, -2), values[:, :, None]
    done = []
    for start in range(0, tokens, _BLOCK):
        block = grouped[..., start : start + _BLOCK, :]
        end = start + block.shape[-2]
        seen = reach - tokens + end if ordered else reach
        if hidden is None:
            scores = (block * scale) @ keys
        else:
            added = _aligned(hidden, end - start, seen) if ordered else hidden[..., start:end, :]
            scores = mx.addmm(added, block, keys[..., :seen], alpha=scale)
        weights, sums = exponentials.softmax(scores)
        done.append((weights @ values[..., :seen, :]) / sums)
    attended = mx.concatenate(done, axis=-2) if len(done) > 1 else done[0]
    return attended.reshape(rows, heads, tokens, values.shape[-1])


def _hidden(mask: Mask, shape: tuple[int, int, int], tokens: int, reach: int, layer: Any) -> mx.array | None:
    """What is added to scores [rows, groups, shared, tokens, keys] to hide some; for "causal" it is of one block, as
    `_aligned` takes it. None for no mask, and for one that is not of that shape or not of these types."""
    if isinstance(mask, str):
        last = (tokens - 1) % _BLOCK + 1
        return _behind(min(tokens, _BLOCK), reach - last)
    if mask is None or mask.ndim != 4 or mask.shape[-2:] != (tokens, reach):
        return None
    if mask.dtype == mx.bool_:
        known = layer.added(mask) if hasattr(layer, "added") else None
        mask = masks.numbers(mask) if known is None else known
    elif mask.dtype != mx.float32:
        return None
    return mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], *shape[1:], tokens, reach)


def _behind(queries: int, before: int) -> mx.array:
    """[queries, before + queries]: hides keys behind each query's own, the first one's after `before`."""
    triangle = _triangle()[:queries, :queries]
    return mx.concatenate([mx.zeros((queries, before)), triangle], axis=1) if before else triangle


def _aligned(behind: mx.array, queries: int, seen: int) -> mx.array:
    """[queries, seen] of that, for so many queries of which the last is the last key that is seen."""
    most, width = behind.shape
    end = width - most + queries
    return behind[:queries, end - seen : end]


@cache
def _triangle() -> mx.array:
    places = mx.arange(_BLOCK)
    triangle = masks.numbers(places <= places[:, None])
    mx.eval(triangle)
    return triangle
