"""Products with packed keys and values on the CPU, a tile at a time.

MLX's quantised products run on one thread there, without BLAS: at 16,000 tokens they take twice as long as float32's.
Unpacking everything first is no better, since that writes four bytes for each that it reads. Here a tile of bytes is
made float32 while it fits a core's second-level cache, and multiplied by BLAS as it is; scales and biases are applied
to what comes out, not to what goes in: x · (s w + b) is s (x · w) + b Σx, and p · (s w + b) is (p s) · w + p · b.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Final

import mlx.core as mx

Packed = tuple[mx.array, mx.array, mx.array]
"""Values [rows, heads, tokens, width · bits / 32] of uint32, scales and biases [rows, heads, tokens, width / group]."""

_TILE: Final = 1 << 20
"""Bytes of float32 that are multiplied at once."""

_LEAST: Final = 1024
"""Tokens from which tiles pay for their operations."""

_ON_CPU: Final = mx.default_device() == mx.Device(mx.cpu)


def applies(x: mx.array, packed: Packed, bits: int) -> bool:
    """Whether tiles are the faster way to compute a product of `x` with these."""
    return _ON_CPU and x.dtype == packed[1].dtype == mx.float32 and bits in (2, 4, 8) and packed[0].shape[2] >= _LEAST


def scores(x: mx.array, packed: Packed, group_size: int, bits: int) -> mx.array:
    """x [rows, heads, queries, width] times the transpose of the values: [rows, heads, queries, tokens]."""
    _, scales, biases = packed
    rows, heads, queries, width = x.shape
    sums = x.reshape(rows, heads, queries, width // group_size, group_size).sum(-1)
    found: mx.array = sums @ biases.swapaxes(-1, -2)
    lanes = 8 // bits
    for group in range(width // group_size):
        of_lanes = [x[..., group * group_size + lane : (group + 1) * group_size : lanes] for lane in range(lanes)]
        parts = [
            reduce(mx.add, (part @ tile.swapaxes(-1, -2) for part, tile in zip(of_lanes, tiles, strict=True)))
            for _, tiles in _tiles(packed, group, group_size, bits)
        ]
        found = found + mx.concatenate(parts, axis=-1) * _across(scales, group)
    return found


def weighted(p: mx.array, packed: Packed, group_size: int, bits: int) -> mx.array:
    """p [rows, heads, queries, tokens] times the values: [rows, heads, queries, width]."""
    _, scales, biases = packed
    of_biases = p @ biases
    groups = []
    for group in range(scales.shape[-1]):
        scaled = p * _across(scales, group)
        lanes: list[mx.array] = [mx.array(0.0)] * (8 // bits)
        for span, tiles in _tiles(packed, group, group_size, bits):
            lanes = [total + scaled[..., span] @ tile for total, tile in zip(lanes, tiles, strict=True)]
        values = mx.stack(lanes, axis=-1).flatten(-2)
        groups.append(values + of_biases[..., group : group + 1])
    return mx.concatenate(groups, axis=-1)


def _across(scales: mx.array, group: int) -> mx.array:
    """[rows, heads, 1, tokens]: one group's scales, contiguous, as elementwise operations are fast on it only then."""
    return mx.contiguous(scales[..., group : group + 1].swapaxes(-1, -2))


def _tiles(packed: Packed, group: int, group_size: int, bits: int) -> Iterator[tuple[slice, list[mx.array]]]:
    """One group's values, tile by tile: which tokens, and for each of a byte's lanes [rows, heads, tokens, ·] float32.

    `mx.quantize` packs from the lowest bits up, so lane j has every (8 / bits)-th value from the j-th on.
    """
    bytes_ = packed[0].view(mx.uint8)
    rows, heads, tokens, _ = bytes_.shape
    first, last = group * group_size * bits // 8, (group + 1) * group_size * bits // 8
    step = max(64, _TILE // (4 * rows * heads * (last - first)))
    for start in range(0, tokens, step):
        span = slice(start, min(start + step, tokens))
        tile = bytes_[:, :, span, first:last]
        if bits == 8:
            yield span, [tile.astype(mx.float32)]
            continue
        tile, mask = mx.contiguous(tile), mx.array((1 << bits) - 1, dtype=mx.uint8)
        yield span, [((tile >> shift) & mask).astype(mx.float32) for shift in range(0, 8, bits)]
