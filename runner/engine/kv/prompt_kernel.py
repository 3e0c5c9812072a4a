"""A prompt's attention in two launches on CUDA: of calls wider than those that `attention_kernel` does in one.

In separate operations a layer's attention is some fifteen launches where prompts have different lengths: rotations,
writes with copies of what they write, a scale, a product, a mask, a softmax, a product, a copy. The host takes longer
to start them than the device to compute them, and every row of the batch waits for it. Here the first launch rotates
queries and keys, and writes keys and values into the planes; the second attends to them there (`prompt_source.py`).

The planes are written in place, without MLX's knowing; `attention_kernel` says why that is sound, and what it asks of
others. What is different here: the second launch reads what the first has written, so it takes the first one's output,
the queries, as an input. And it reads keys of padding, which the next call may write over: that call takes the output
of this one as its `after`.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel
from runner.engine.kv.attention_kernel import SWITCH, counters, partial, power, rotating
from runner.engine.kv.calls import Call, Launch, Planes
from runner.engine.kv.masks import FEW
from runner.engine.kv.prompt_source import ATTEND, DEVICE, WRITE
from runner.engine.tensor_cores import DEVICE as PRODUCTS

WARPS: Final = 4
"""Of a block that attends."""

KEYS: Final = 64
"""That are in shared memory at once, and as many on their way there."""

_WIDEST: Final = 128
_TILE: Final = 16
_WARP: Final = 32
_THREADS: Final = 256
"""Of a block that writes, at most."""

_SHARE: Final = 512
"""Places that are worth a block."""

_MOST_SPLITS: Final = 32

WRITE_INPUTS: Final = ("queries", "keys", "values", "held_keys", "held_values", "starts", "after", "frequencies")
ATTEND_INPUTS: Final = ("queries", "held_keys", "held_values", "starts", "counters")
"""What the sources call a call's arrays."""

_TYPES: Final = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
"""Of those that are not the tokens'."""


def applies(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether the launches can do it: 16 bits, lines of whole tiles that are not too wide, more than a few tokens."""
    _, heads, tokens, width = queries.shape
    return (
        tokens > FEW
        and queries.dtype == keys.dtype == values.dtype
        and keys.shape == values.shape
        and keys.shape[3] == width
        and heads % keys.shape[1] == 0
        and takes(width, queries.dtype)
    )


def takes(width: int, dtype: mx.Dtype) -> bool:
    """Whether they can do it for lines so wide, of this type."""
    return dtype in KINDS and width % _TILE == 0 and 0 < width <= _WIDEST


def launch() -> Launch | None:
    """The kernels, if there is a device for them and the switch is not off."""
    return write_and_attend if cuda_kernels.usable(SWITCH) else None


def write_and_attend(call: Call) -> tuple[mx.array, Planes]:
    """What each query sees, [rows, heads, tokens, width], and the planes, which have the new keys and values then.

    The place of each of the call's positions is itself: a ring must not have to wrap for it.
    """
    rows, heads, tokens, width = call.queries.shape
    dtype = call.queries.dtype
    frequencies, constants = rotating(call.rotation)
    threads = lines(width) * width // 2
    queries = _write(dtype, width, *(value for _, value in constants)).launch(
        inputs=[
            *(call.queries, call.keys, call.values),
            *call.planes,
            call.starts,
            call.queries if call.after is None else call.after,
            frequencies,
        ],
        grid=(rows * tokens * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, heads, tokens, width)],
        output_dtypes=[dtype],
    )[0]
    blocks = rows * heads * -(-tokens // (_TILE * WARPS))
    shares = splits(blocks, call.planes[0].shape[2], tokens, call.window)
    out, _ = _attend(dtype, width, call.window or 0, call.scale).launch(
        inputs=[queries, *call.planes, call.starts, counters(shares, blocks)],
        grid=(blocks * shares * WARPS * _WARP, 1, 1),
        threadgroup=(WARPS * _WARP, 1, 1),
        output_shapes=[(rows, tokens, heads, width), partial(blocks, shares, WARPS * _TILE, width)],
        output_dtypes=[dtype, mx.float32],
    )
    # In this order upstream's next transposition makes it contiguous.
    return out.swapaxes(1, 2), call.planes


def splits(blocks: int, places: int, tokens: int, window: int | None) -> int:
    """How many blocks share the keys of a row that has room for so many, where there are `blocks` without that."""
    keys = places if window is None else min(places, tokens + window)
    return power(min(PROCESSORS // blocks, keys // _SHARE, _MOST_SPLITS))


def lines(width: int) -> int:
    """How many lines of a token a block writes at once."""
    return _THREADS // (width // 2)


def shared_memory(width: int, warps: int = WARPS) -> int:
    """Bytes of it that a block takes which attends: its queries, and twice as many keys and values as it sees."""
    return (warps * _TILE + 4 * KEYS) * (width + 8) * 2


def write_header(dtype: mx.Dtype, width: int, rotated: int, traditional: int, at_once: int) -> str:
    """What comes before WRITE, a block of which writes so many lines `at_once`."""
    return (
        f"using T = {KINDS[dtype][0]};\nconstexpr int D = {width}, LINES = {at_once};\n"
        f"constexpr int ROTATED = {rotated}, TRADITIONAL = {traditional};\n"
    )


def attend_constants(dtype: mx.Dtype, width: int, window: int, scale: float, warps: int = WARPS) -> str:
    """What ATTEND does not say: scores are powers of two."""
    kind, operand = KINDS[dtype]
    return (
        f'using T = {kind};\n#define KIND "{operand}"\n'
        f"constexpr int D = {width}, WARPS = {warps}, KEYS = {KEYS}, WINDOW = {window};\n"
        f"constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"
    )


def attend_header(dtype: mx.Dtype, width: int, window: int, scale: float) -> str:
    """What comes before it."""
    return attend_constants(dtype, width, window, scale) + PRODUCTS + DEVICE


@cache
def _write(dtype: mx.Dtype, width: int, rotated: int, traditional: int) -> Kernel:
    return Kernel(
        name=f"write_prompt_{KINDS[dtype][1]}_{width}_{rotated}_{traditional}",
        inputs={name: _TYPES.get(name, dtype) for name in WRITE_INPUTS},
        outputs={"rotated": dtype},
        source=cuda_kernels.terse(WRITE),
        header=write_header(dtype, width, rotated, traditional, lines(width)),
        # A copy of the planes would be written in their place. Strides are the kernel's business.
        ensure_row_contiguous=False,
    )


@cache
def _attend(dtype: mx.Dtype, width: int, window: int, scale: float) -> Kernel:
    return Kernel(
        name=f"attend_prompt_{KINDS[dtype][1]}_{width}_{window}_{struct.pack('>f', scale).hex()}",
        inputs={name: _TYPES.get(name, dtype) for name in ATTEND_INPUTS},
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(ATTEND),
        header=attend_header(dtype, width, window, scale),
        ensure_row_contiguous=False,
        shared_memory=shared_memory(width),
    )
