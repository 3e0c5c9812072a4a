"""Who sees whom: masks of a model call, from positions.

All are [rows or 1, 1, queries, keys], True where a query sees a key; None where every query sees every key, and
upstream's word "causal" where only the order matters.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from runner.engine.kv.positions import Positions

Mask = mx.array | str | None

FEW: Final = 16
"""Tokens a row up to which a call's attention is a small product: its mask is then cheap as an array."""


ON_CPU: Final = mx.default_device() == mx.Device(mx.cpu)


def straight(positions: Positions, window: int | None, as_array: bool) -> Mask:
    """Keys at positions 0 to reach - 1. A query sees itself and what is before it, `window` of them in all."""
    count, same = positions.count, positions.same
    if window is not None and positions.reach <= window:
        window = None
    # On the CPU MLX would work out what the word means in every layer.
    as_array = as_array or (ON_CPU and 1 < count <= FEW)
    if same is not None and window is None and not as_array:
        return None if count == 1 else "causal"
    return visible(queries(positions), mx.arange(positions.reach), window)


def roomy(positions: Positions, window: int | None) -> mx.array:
    """Keys at all places of a slot, those included that hold no tokens yet."""
    return visible(queries(positions), mx.arange(positions.capacity), window)


def ring(positions: Positions, size: int, window: int) -> Mask:
    """Keys of a ring of `size` places that this call has been written into, position p at place p % size."""
    if positions.count == 1 and size == window and positions.least + 1 >= size:
        return None
    ends = starts(positions)[:, None] + (positions.count - 1)
    return visible(queries(positions), held(ends, size, size)[:, None, None], window)


def before_and_new(positions: Positions, places: int, size: int, window: int) -> mx.array:
    """The first `places` places of a ring as they were before this call, then the call's own keys."""
    first = starts(positions)[:, None]
    own = first + mx.arange(positions.count)
    keys = mx.concatenate([held(first - 1, size, places), own], axis=1)
    return visible(queries(positions), keys[:, None, None], window)


def held(ends: mx.array, size: int, places: int) -> mx.array:
    """[rows, places]: the position at each place of rings that were filled up to `ends` [rows, 1]; negative for none.

    After tokens were cut off, a place may hold a later position than this says. The one it says is then out of every
    query's window, as long as no more were cut off than the ring has places beyond the window.
    """
    return ends - mx.remainder(ends - mx.arange(places), size)


def starts(positions: Positions) -> mx.array:
    """[rows or 1] int32: tokens before the call."""
    same = positions.same
    return positions.starts if same is None else mx.array([same], dtype=mx.int32)


def queries(positions: Positions) -> mx.array:
    """[rows or 1, 1, count, 1]: positions of the call's tokens."""
    return (starts(positions)[:, None] + mx.arange(positions.count))[:, None, :, None]


def visible(of: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """The mask for positions `of` queries and of `keys`."""
    seen: mx.array = keys <= of
    if window is not None:
        seen = seen & (keys > of - window)
    return seen & (keys >= 0) if keys.ndim > 1 else seen


def numbers(mask: mx.array) -> mx.array:
    """What has the same effect as a `mask` of booleans once it is added to scores of float32."""
    hidden: mx.array = mx.where(mask, mx.array(0.0), mx.finfo(mx.float32).min)
    return hidden


def added(mask: mx.array, shape: tuple[int, int, int, int]) -> mx.array:
    """`numbers` of a `mask` [rows or 1, 1, tokens, keys] for scores [rows, groups, shared · tokens, keys]; `shape` is
    (rows, groups, shared, tokens)."""
    rows, groups, shared, tokens = shape
    hidden = numbers(mask)
    keys = mask.shape[-1]
    lines = mx.broadcast_to(hidden[:, :, None], (hidden.shape[0], 1, shared, tokens, keys))
    return mx.broadcast_to(lines.reshape(-1, 1, shared * tokens, keys), (rows, groups, shared * tokens, keys))


def masked(scores: mx.array, mask: mx.array, shape: tuple[int, int, int, int]) -> mx.array:
    """`scores` [rows, groups, shared · tokens, keys] where `mask` allows; `shape` is (rows, groups, shared, tokens).

    The mask is [rows, 1 or groups · shared, tokens, keys] or broadcasts to it; of a number type, it is added.
    """
    rows, groups, shared, tokens = shape
    apart = scores.reshape(rows, groups, shared, tokens, -1)
    if mask.ndim > 2:
        heads = mask.shape[-3]
        by_head = (1, 1) if heads == 1 else (groups, shared)
        mask = mask.reshape(*mask.shape[:-3], *by_head, *mask.shape[-2:])
    only = mask.dtype == mx.bool_
    apart = mx.where(mask, apart, mx.finfo(apart.dtype).min) if only else apart + mask
    return apart.reshape(scores.shape)
