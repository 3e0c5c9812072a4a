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
from msgspec.structs import replace

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import PROCESSORS, Kernel
from runner.engine.kv import attention_source, decode_kernel
from runner.engine.kv.attention_kernel import SWITCH, Rotating, few_alike, launched, rotating
from runner.engine.kv.decode_source import JOINED
from runner.engine.kv.masks import FEW
from runner.engine.kv.quantised_device import DEVICE, HEADER
from runner.engine.kv.quantised_source import SOURCE
from runner.engine.kv.rotary import Rotation

_KEYS: Final = 16
"""Keys of a product."""

_SET: Final = 8
"""Queries of a product."""

_RING: Final = 40_000
"""Bytes of tiles that a block has on their way: with four blocks, more than a multiprocessor's share of the memory
delivers within its latency."""

_WIDEST: Final = 256
"""Values of a key at most: a thread sums up a quarter as many, for eight queries."""

_TWICE: Final = 256
"""Bytes of a query of which a block may have two eights: their sums have room in registers."""

_SHARED: Final = 98_000
"""Bytes of shared memory that a block of any device with such products may have."""

_AT_ONCE: Final = ((128, 4), (256, 3))
"""How many blocks have room on a multiprocessor, by bytes of a block's queries for each of eight: registers allow no
more. Others are two."""

_SHARE: Final = 2048
"""Keys that are worth a block where there are so many of them."""

_MOST_SPLITS: Final = 64

HELD: Final = tuple(f"held_{name}{part}" for name in ("key", "value") for part in ("s", "_scales", "_biases"))
"""What the source calls the planes."""

INPUTS: Final = ("queries", "keys", "values", *HELD, "starts", "after", "counters", "frequencies")
"""What the source calls a call's arrays."""


class PackedCall(msgspec.Struct, frozen=True, eq=False):
    """A layer's attention in a model call, and what is to be written before it.

    As `calls.Call`; `planes` are packed values, scales and biases of keys, and of values. `bits` are of a
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


class JoinedPackedCall(msgspec.Struct, frozen=True, eq=False):
    """The same of queries, keys and values side by side, as `calls.JoinedCall` has them."""

    joined: mx.array
    heads: int
    groups: int
    width: int
    planes: Sequence[mx.array]
    starts: mx.array
    scale: float
    bits: int
    group_size: int
    after: mx.array | None
    rotation: Rotation


Constants = tuple[tuple[str, int], ...]

PackedLaunch = Callable[[PackedCall], tuple[mx.array, Sequence[mx.array]]]
"""What does a call: returns what is attended to, and the planes with the new keys and values."""


JoinedPackedLaunch = Callable[[JoinedPackedCall], tuple[mx.array, Sequence[mx.array]]]
"""What does that: returns what is attended to, [rows, tokens, heads · width], and the planes."""


def applies(queries: mx.array, keys: mx.array, values: mx.array, bits: int, group_size: int) -> bool:
    """Whether a launch can do it: few tokens, whole vectors."""
    _, heads, tokens, width = queries.shape
    return (
        few_alike(queries, keys, values)
        and width <= _WIDEST
        and bits in (4, 8)
        and group_size >= 32
        and width % group_size == 0
        and width * bits % 128 == 0
        and shape(width, queries.dtype.size, (bits, group_size), heads, keys.shape[1], tokens) is not None
    )


@cache
def applies_joined(
    dtype: mx.Dtype, tokens: int, heads: int, groups: int, width: int, bits: int, group_size: int
) -> bool:
    """The same where queries, keys and values are one."""
    queries, keys = (mx.zeros((1, count, tokens, width), dtype) for count in (heads, groups))
    return applies(queries, keys, keys, bits, group_size)


class Shape(msgspec.Struct, frozen=True):
    """How blocks share the work: `parts` of `heads` query heads for each of `groups` key heads.

    A block has eights of queries (`sets`), and warps, each with `stages` tiles on their way. `few` is how many tokens a
    row may have. Of a key `line` bytes are codes, as many of scales as of biases, and `own` as the model has it. A
    multiprocessor has `at_once` blocks.
    """

    groups: int
    parts: int
    heads: int
    sets: int
    few: int
    line: int
    scales: int
    own: int
    width: int
    at_once: int
    warps: int = 4
    stages: int = 2

    @property
    def crowd(self) -> int:
        """Blocks that keep a large GPU busy: all that have room. In 16 bits half as many do, of twice the bytes."""
        return self.at_once * PROCESSORS

    @property
    def lines(self) -> int:
        """Queries of a block, of which those of its last tokens may not be there."""
        return self.sets * _SET

    @property
    def several(self) -> int:
        """Tokens of a block."""
        return self.lines // self.heads

    def blocks(self, rows: int, tokens: int) -> int:
        """For so many tokens of each row, where nobody shares keys."""
        return rows * self.groups * self.parts * -(-tokens // self.several)

    @property
    def tile(self) -> int:
        """Bytes of 16 keys and values."""
        return _KEYS * 2 * (self.line + 2 * self.scales)

    @property
    def shared_memory(self) -> int:
        """Bytes of it that a block asks for."""
        sums = self.lines * (self.width + 4) * 4
        new = self.lines * self.own + self.few * 2 * (self.line + self.own + 2 * self.scales)
        used = max(self.warps * max(self.stages * self.tile, sums) + new, self.lines * _MOST_SPLITS * 4)
        return used + 2 * self.warps * self.lines * 4 + 16


@cache
def shape(width: int, itemsize: int, how: tuple[int, int], heads: int, groups: int, tokens: int) -> Shape | None:
    """For lines of `width` values, and `how` many bits and values to a scale; None if the lines are too wide.

    There are two of a model, for one token of a row and for several, and a start compiles both.
    """
    shared, widest = heads // groups, 2 * _SET if width * itemsize <= _TWICE else _SET
    together = max(n for n in range(1, widest + 1) if shared % n == 0)
    sets, few = -(-(together if tokens == 1 else widest) // _SET), 1 if tokens == 1 else FEW
    bits, size = how
    sizes = width * bits // 8, width // size * itemsize, width * itemsize
    at_once = next((blocks for most, blocks in _AT_ONCE if sets * width * itemsize <= most), 2)
    plain = Shape(groups, shared // together, together, sets, few, *sizes, width, at_once)
    for warps in (4, 2, 1):
        way = replace(plain, warps=warps, stages=max(2, min(4, _RING // (warps * plain.tile))))
        if way.shared_memory <= _SHARED:
            return way
    return None


def launch() -> PackedLaunch | None:
    """The kernel, if there is a device for it and the switch is not off."""
    return attend_and_write if cuda_kernels.usable(SWITCH) else None


def splits(way: Shape, blocks: int, places: int) -> int:
    """How many blocks may share the keys of a row that has room for so many, where there are `blocks` without that."""
    return decode_kernel.splits(blocks, places, way.warps, way.crowd, _MOST_SPLITS)


def shape_of(call: PackedCall) -> Shape:
    """The shape of a launch that applies."""
    _, heads, tokens, width = call.queries.shape
    way = shape(width, call.queries.dtype.size, (call.bits, call.group_size), heads, call.keys.shape[1], tokens)
    assert way is not None
    return way


def attend_and_write(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """What each query sees, [rows, heads, tokens, width], and the planes, which have the new keys and values then."""
    rows, heads, tokens, width = call.queries.shape
    way, places = shape_of(call), call.planes[0].shape[2]
    # What is copied of a row ends with a tile.
    assert places % _KEYS == 0
    blocks = way.blocks(rows, tokens)
    sizes = blocks, splits(way, blocks, min(places, call.window or places)), way.warps * 32, way.lines
    numbers = constants(width, call.bits, call.group_size, call.window or 0, way)
    kernel = _kernel(call.scale, call.queries.dtype, numbers, way.shared_memory, rotating(call.rotation)[1])
    new = call.queries, call.keys, call.values
    return launched(kernel, call, new, sizes, (rows, tokens, heads, width), width).swapaxes(1, 2), call.planes


def joined_launch(launch: PackedLaunch | None) -> JoinedPackedLaunch | None:
    """What a layer that has this launch may call where nothing was taken apart yet."""
    return attend_joined if launch is attend_and_write else None


def attend_joined(call: JoinedPackedCall) -> tuple[mx.array, Sequence[mx.array]]:
    """As `attend_and_write`."""
    rows, tokens, _ = call.joined.shape
    dtype, places = call.joined.dtype, call.planes[0].shape[2]
    way = shape(call.width, dtype.size, (call.bits, call.group_size), call.heads, call.groups, tokens)
    assert way is not None
    assert places % _KEYS == 0
    blocks = way.blocks(rows, tokens)
    sizes = blocks, splits(way, blocks, places), way.warps * 32, way.lines
    numbers = constants(call.width, call.bits, call.group_size, 0, way)
    kernel = _kernel(call.scale, dtype, numbers, way.shared_memory, rotating(call.rotation)[1], joined=True)
    attended = rows, tokens, call.heads * call.width
    return launched(kernel, call, (call.joined,), sizes, attended, call.width), call.planes


@cache
def constants(width: int, bits: int, group_size: int, window: int, way: Shape) -> Constants:
    """What the source calls the numbers that are known when it is compiled."""
    return (
        *(("D", width), ("BITS", bits), ("GROUP", group_size), ("WINDOW", window), ("FEW", way.few)),
        *(("KEY_HEADS", way.groups), ("PARTS", way.parts), ("HEADS", way.heads), ("SETS", way.sets)),
        *(("WARPS", way.warps), ("STAGES", way.stages), ("MOST_SPLITS", _MOST_SPLITS)),
        *(("CROWD", way.crowd), ("SHARE", _SHARE // _KEYS)),
    )


def types(dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """Of the arrays that a launch takes, in their order."""
    others = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
    others |= {"held_keys": mx.uint32, "held_values": mx.uint32}
    return {name: others.get(name, dtype) for name in INPUTS}


def joined_types(dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """The same where queries, keys and values are one."""
    return {"joined": dtype} | {name: kind for name, kind in types(dtype).items() if name not in INPUTS[:3]}


def joined_source() -> str:
    """The kernel's text for that."""
    return cuda_kernels.filled(JOINED, {"GROUPS": "KEY_HEADS"}) + SOURCE


def header(scale: float) -> str:
    """What comes before the kernel: scores are powers of two, and MLX looks for a group's range from here on CUDA."""
    range_of = "constexpr float LEAST = 3.4028235e38f, MOST = 0.0f;\n"
    return (
        f"{DEVICE}{attention_source.HEADER}{HEADER}{range_of}constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"
    )


@cache
def _kernel(
    scale: float,
    dtype: mx.Dtype,
    sizes: Constants,
    shared_memory: int,
    rotating: Rotating,
    *,
    joined: bool = False,
) -> Kernel:
    return Kernel(
        name="attend_and_write_packed" + ("_joined" if joined else ""),
        inputs=joined_types(dtype) if joined else types(dtype),
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(joined_source() if joined else SOURCE),
        header=header(scale),
        ensure_row_contiguous=False,
        shared_memory=shared_memory,
        template=[("T", dtype), *sizes, *rotating],
    )
