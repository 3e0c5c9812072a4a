"""Packed keys and values written, and attended to as they are packed, in one launch on CUDA.

What `attention_kernel` is for plain ones: writing in place, in which order, and who has to have it dispatched is said
there. Keys in 8 bits are half the bytes to read, so that long contexts take less time, not more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel
from runner.engine.kv import attention_source
from runner.engine.kv.attention_kernel import SWITCH, Rotating, counters, few_alike, partial, rotating, splits
from runner.engine.kv.masks import FEW
from runner.engine.kv.quantised_device import DEVICE, HEADER
from runner.engine.kv.quantised_source import SOURCE
from runner.engine.kv.rotary import Rotation

_KEYS: Final = 16
"""Keys of a tile."""

_LINES: Final = 16
"""Queries of a product."""

_RING: Final = 40_000
"""Bytes of tiles that a block has on their way: with four blocks, more than a multiprocessor's share of the memory
delivers within its latency."""

_WIDEST: Final = 256
"""Values of a key at most: a thread sums up half as many."""

_SHARED: Final = 98_000
"""Bytes of shared memory that a block of any device with such products may have."""

HELD: Final = tuple(f"held_{name}{part}" for name in ("key", "value") for part in ("s", "_scales", "_biases"))
"""What the source calls the planes."""

INPUTS: Final = ("queries", "keys", "values", *HELD, "starts", "after", "counters", "frequencies")
"""What the source calls a call's arrays."""


class PackedCall(msgspec.Struct, frozen=True, eq=False):
    """A layer's attention in a model call, and what is to be written before it.

    As `attention_kernel.Call`; `planes` are packed values, scales and biases of keys, and of values. `bits` are of a
    value, `group_size` values share a scale. New keys and values come as the model makes them, and are packed on the
    way.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    planes: Sequence[mx.array]
    starts: mx.array
    scale: float
    window: int | None
    bits: int
    group_size: int
    after: mx.array | None
    rotation: Rotation | None = None


Constants = tuple[tuple[str, int], ...]

PackedLaunch = Callable[[PackedCall], tuple[mx.array, Sequence[mx.array]]]
"""What does a call: returns what is attended to, and the planes with the new keys and values."""


def applies(queries: mx.array, keys: mx.array, values: mx.array, bits: int, group_size: int) -> bool:
    """Whether a launch can do it: few tokens, whole vectors."""
    heads, width = queries.shape[1], queries.shape[3]
    return (
        few_alike(queries, keys, values)
        and width <= _WIDEST
        and bits in (4, 8)
        and group_size >= 32
        and width % group_size == 0
        and width * bits % 128 == 0
        and shape(width, queries.dtype.size, bits, group_size, heads // keys.shape[1]) is not None
    )


class Shape(msgspec.Struct, frozen=True):
    """How a block shares the work: query heads of a block, warps, and tiles that each has on their way."""

    heads: int
    warps: int
    stages: int
    shared_memory: int

    @property
    def several(self) -> int:
        """Tokens of a block."""
        return _LINES // self.heads


@cache
def shape(width: int, itemsize: int, bits: int, group_size: int, shared: int) -> Shape | None:
    """For lines of `width` values, and `shared` query heads a key head; None if the lines are too wide."""
    line = width * bits // 8
    scales = width // group_size * itemsize
    tile = 2 * (_KEYS * line + _KEYS // 4 * 32) + 4 * _KEYS * scales
    rest = _LINES * (width + 4) * 4 + FEW * (2 * line + 4 * scales + 2 * width * itemsize)
    for warps in (4, 2, 1):
        stages = max(2, min(4, _RING // (warps * tile)))
        needed = max(warps * stages * tile + rest, warps * _LINES * (width + 2) * 4 + 16)
        if needed <= _SHARED:
            return Shape(max(n for n in range(1, _LINES + 1) if shared % n == 0), warps, stages, needed)
    return None


def launch() -> PackedLaunch | None:
    """The kernel, if there is a device for it and the switch is not off."""
    return attend_and_write if cuda_kernels.usable(SWITCH) else None


def blocks_of(call: PackedCall, way: Shape) -> int:
    """Blocks of a launch in which none share keys."""
    rows, heads, tokens, _ = call.queries.shape
    return rows * (heads // way.heads) * -(-tokens // way.several)


def shape_of(call: PackedCall) -> Shape:
    """The shape of a launch that applies."""
    _, heads, _, width = call.queries.shape
    way = shape(width, call.queries.dtype.size, call.bits, call.group_size, heads // call.keys.shape[1])
    assert way is not None
    return way


def attend_and_write(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """What each query sees, [rows, heads, tokens, width], and the planes, which have the new keys and values then."""
    rows, heads, tokens, width = call.queries.shape
    way, places = shape_of(call), call.planes[0].shape[2]
    # What is copied of a row ends with a tile.
    assert places % _KEYS == 0
    blocks = blocks_of(call, way)
    shares = splits(blocks, min(places, call.window or places))
    frequencies, rotation = rotating(call.rotation)
    dtype, sizes = call.queries.dtype, constants(width, call.bits, call.group_size, call.window or 0, way)
    out, _ = _kernel(call.scale, dtype, sizes, way.shared_memory, rotation).launch(
        inputs=[
            *(call.queries, call.keys, call.values, *call.planes, call.starts),
            call.queries if call.after is None else call.after,
            counters(shares, blocks),
            frequencies,
        ],
        grid=(blocks * shares * way.warps * 32, 1, 1),
        threadgroup=(way.warps * 32, 1, 1),
        output_shapes=[(rows, tokens, heads, width), partial(blocks, shares, way.several * way.heads, width)],
        output_dtypes=[dtype, mx.float32],
    )
    return out.swapaxes(1, 2), call.planes


@cache
def constants(width: int, bits: int, group_size: int, window: int, way: Shape) -> Constants:
    """What the source calls the numbers that are known when it is compiled."""
    return (
        *(("D", width), ("BITS", bits), ("GROUP", group_size), ("WINDOW", window), ("FEW", FEW)),
        *(("HEADS", way.heads), ("WARPS", way.warps), ("STAGES", way.stages)),
    )


def types(dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """Of the arrays that a launch takes, in their order."""
    others = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
    others |= {"held_keys": mx.uint32, "held_values": mx.uint32}
    return {name: others.get(name, dtype) for name in INPUTS}


def header(scale: float) -> str:
    """What comes before the kernel: scores are powers of two, and MLX looks for a group's range from here on CUDA."""
    range_of = "constexpr float LEAST = 3.4028235e38f, MOST = 0.0f;\n"
    return (
        f"{DEVICE}{attention_source.HEADER}{HEADER}{range_of}constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"
    )


@cache
def _kernel(scale: float, dtype: mx.Dtype, sizes: Constants, shared_memory: int, rotating: Rotating) -> Kernel:
    return Kernel(
        name="attend_and_write_packed",
        inputs=types(dtype),
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(SOURCE),
        header=header(scale),
        ensure_row_contiguous=False,
        shared_memory=shared_memory,
        template=[("T", dtype), *sizes, *rotating],
    )
