"""Packed keys and values written, and attended to as they are packed, in one launch on CUDA.

What `attention_kernel` is for plain ones: writing in place, in which order, and who has to have it dispatched is said
there. Keys in 8 bits are half the bytes to read, so that long contexts take less time, not more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel
from runner.engine.kv import attention_source
from runner.engine.kv.attention_kernel import SWITCH, Rotating, Shape, counters, partial, rotating, splits
from runner.engine.kv.masks import FEW
from runner.engine.kv.quantised_source import HEADER, SOURCE
from runner.engine.kv.rotary import Rotation

_MINE: Final = 16
"""Values of a key that a lane has."""

_HEADS: Final = 4
_THREADS: Final = 128

_SHARED: Final = 48_000

HELD: Final = tuple(f"held_{name}{part}" for name in ("key", "value") for part in ("s", "_scales", "_biases"))
"""What the source calls the planes."""

INPUTS: Final = ("queries", "keys", "values", *HELD, "starts", "after", "counters", "frequencies")
"""What the source calls a call's arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedCall:
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


PackedLaunch = Callable[[PackedCall], tuple[mx.array, Sequence[mx.array]]]
"""What does a call: returns what is attended to, and the planes with the new keys and values."""


def applies(queries: mx.array, keys: mx.array, values: mx.array, bits: int, group_size: int) -> bool:
    """Whether a launch can do it: few tokens, lanes by powers of two."""
    groups = keys.shape[1]
    _, heads, tokens, width = queries.shape
    lanes = width // _MINE
    return (
        tokens <= FEW
        and queries.dtype == keys.dtype == values.dtype
        and keys.shape == values.shape
        and keys.shape[3] == width
        and queries.dtype in (mx.bfloat16, mx.float16, mx.float32)
        and bits in (4, 8)
        and width % group_size == 0
        and lanes * _MINE == width
        and lanes & (lanes - 1) == 0
        and 0 < lanes <= 32
        and heads % groups == 0
        and _shared(width, queries.dtype.size, bits) <= _SHARED
    )


def _shared(width: int, itemsize: int, bits: int) -> int:
    """Bytes of shared memory, at most."""
    new = 2 * FEW * (width * itemsize + width * bits // 8 + 2 * (width // 32) * 4)
    return new + _HEADS * width * 4 + _THREADS // 32 * _HEADS * (width + 4) * 4


@cache
def shape(width: int, shared: int) -> Shape:
    """How a block's threads share the work, for lines of `width` values and `shared` query heads a key head."""
    return Shape(width // _MINE, max(n for n in range(1, _HEADS + 1) if shared % n == 0), _THREADS)


def launch() -> PackedLaunch | None:
    """The kernel, if there is a device for it and the switch is not off."""
    return attend_and_write if cuda_kernels.usable(SWITCH) else None


def attend_and_write(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """What each query sees, [rows, heads, tokens, width], and the planes, which have the new keys and values then."""
    rows, heads, tokens, width = call.queries.shape
    groups = call.keys.shape[1]
    way = shape(width, heads // groups)
    blocks = rows * groups * (heads // groups // way.heads) * tokens
    shares = splits(blocks, call.planes[0].shape[2])
    frequencies, constants = rotating(call.rotation)
    dtype, window = call.queries.dtype, call.window or 0
    out, _ = _kernel(call.scale, dtype, width, way, window, call.bits, call.group_size, constants).launch(
        inputs=[
            *(call.queries, call.keys, call.values, *call.planes, call.starts),
            call.queries if call.after is None else call.after,
            counters(shares, blocks),
            frequencies,
        ],
        grid=(blocks * shares * way.threads, 1, 1),
        threadgroup=(way.threads, 1, 1),
        output_shapes=[(rows, tokens, heads, width), partial(blocks, shares, way.heads, width)],
        output_dtypes=[dtype, mx.float32],
    )
    return out.swapaxes(1, 2), call.planes


def header(scale: float) -> str:
    """What comes before the kernel: scores are powers of two, and MLX looks for a group's range from here on CUDA."""
    range_of = "constexpr float LEAST = 3.4028235e38f, MOST = 0.0f;\n"
    return f"{attention_source.HEADER}{HEADER}{range_of}constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"


@cache
def _kernel(
    scale: float,
    dtype: mx.Dtype,
    width: int,
    way: Shape,
    window: int,
    bits: int,
    group_size: int,
    rotating: Rotating,
) -> Kernel:
    types = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
    types |= {"held_keys": mx.uint32, "held_values": mx.uint32}
    return Kernel(
        name="attend_and_write_packed",
        inputs={name: types.get(name, dtype) for name in INPUTS},
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(SOURCE),
        header=header(scale),
        ensure_row_contiguous=False,
        template=[
            ("T", dtype),
            *(("D", width), ("BITS", bits), ("GROUP", group_size), ("MINE", _MINE)),
            *(("LANES", way.lanes), ("HEADS", way.heads), ("THREADS", way.threads)),
            *(("FEW", FEW), ("WINDOW", window)),
            *rotating,
        ],
    )
