"""How `attention_kernel` has few tokens attend in 16 bits: by tensor cores (`decode_source.py`), where heads are wide.

Keys and values of a row are read once for all of a key head's query heads, and for several tokens; and they are under
way before anything else is done. So what it takes is the memory's time, and three or four of its latencies.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel
from runner.engine.kv.decode_source import DEVICE, JOINED, SOURCE
from runner.engine.kv.prompt_source import DEVICE as MATRICES
from runner.engine.tensor_cores import DEVICE as PRODUCTS

_SET: Final = 8
"""Queries of a product."""

_TILE: Final = 16
"""Keys of a product."""

_WIDTHS: Final = (64, 128, 192, 256)
_WARP: Final = 32

_AHEAD: Final = 48_000
"""Bytes of tiles that a block has on their way at most."""

_WARPS: Final = 4
_STAGES: Final = 3

CROWD: Final = 2 * PROCESSORS
"""Blocks that keep a large GPU busy."""

_SHARE: Final = 2048
"""Keys that are worth a block where there are so many of them."""

_MOST_SPLITS: Final = 32

Constants = tuple[tuple[str, int], ...]
Types = tuple[tuple[str, mx.Dtype], ...]


class Shape(msgspec.Struct, frozen=True):
    """How blocks share the work: `parts` of `heads` query heads for each of `groups` key heads.

    Lines have `width` values. A block has eights of queries (`sets`), and warps, each with `stages` tiles on their way.
    `few` is how many tokens a row may have.
    """

    width: int
    groups: int
    parts: int
    heads: int
    sets: int
    few: int
    warps: int
    stages: int

    @property
    def lines(self) -> int:
        """Queries of a block, of which those of its last tokens may not be there."""
        return self.sets * _SET

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * _WARP

    @property
    def shared_memory(self) -> int:
        """Bytes of it that a block asks for."""
        return self.warps * self.stages * _tile(self.width)

    def blocks(self, rows: int, tokens: int) -> int:
        """For so many tokens of each row, where nobody shares keys."""
        return rows * self.groups * self.parts * -(-tokens // (self.lines // self.heads))


@cache
def shape(dtype: mx.Dtype, width: int, heads: int, groups: int, tokens: int, most: int) -> Shape | None:
    """For `tokens` of a row, of up to `most`; None where another kernel has it."""
    if dtype not in KINDS or width not in _WIDTHS:
        return None
    shared, widest = heads // groups, _SET if width > 128 else 2 * _SET
    several = max(n for n in range(1, widest + 1) if shared % n == 0)
    sets = -(-min(several * tokens, widest) // _SET)
    stages = max(2, min(_STAGES, _AHEAD // (_WARPS * _tile(width))))
    return Shape(width, groups, shared // several, several, sets, 1 if tokens == 1 else most, _WARPS, stages)


def _tile(width: int) -> int:
    """Bytes of 16 keys and values."""
    return _TILE * width * 2 * 2


def splits(blocks: int, places: int, warps: int, crowd: int | None = None, most: int = _MOST_SPLITS) -> int:
    """How many blocks may share the keys of a row that has room for so many, where there are `blocks` without that.

    As many as keep a GPU busy (`crowd`) if each of their warps has a tile; or, where there is work for all anyway, one
    for each _SHARE keys, so that a long row is not waited for. `most` at most.
    """
    crowd = CROWD if crowd is None else crowd
    busy = min(crowd // blocks, places // (warps * _TILE)) if blocks < crowd else 1
    wanted = min(max(busy, places // _SHARE), most)
    return 1 << max(0, wanted.bit_length() - 1)


def header(dtype: mx.Dtype, constants: Constants, scale: float) -> str:
    """What the source does not say."""
    kind, operand = KINDS[dtype]
    numbers = ", ".join(f"{name} = {value}" for name, value in constants)
    return (
        f'using T = {kind};\n#define KIND "{operand}"\nconstexpr int {numbers};\n'
        f"constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"
    )


def constants(way: Shape, window: int, ring: int, rotating: Constants) -> Constants:
    """What the source calls the numbers that are known when it is compiled."""
    return (
        *(("D", way.width), ("GROUPS", way.groups), ("PARTS", way.parts), ("HEADS", way.heads), ("SETS", way.sets)),
        *(("WARPS", way.warps), ("STAGES", way.stages), ("FEW", way.few), ("WINDOW", window), ("RING", ring)),
        *(("CROWD", CROWD), ("SHARE", _SHARE // _TILE)),
        *rotating,
    )


def whole_header(dtype: mx.Dtype, numbers: Constants, scale: float) -> str:
    """What comes before it."""
    return header(dtype, numbers, scale) + PRODUCTS + MATRICES + DEVICE


@cache
def kernel(way: Shape, window: int, ring: int, rotating: Constants, scale: float, types: Types) -> Kernel:
    """Of arrays of such types, by the names that the source has for them."""
    inputs, dtype, joined = dict(types), types[0][1], types[0][0] == "joined"
    numbers = constants(way, window, ring, rotating)
    name = "_".join(str(value) for _, value in numbers)
    return Kernel(
        name=f"{'joined_' if joined else ''}decode_{KINDS[dtype][1]}_{name}_{struct.pack('>f', scale).hex()}",
        inputs=inputs,
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(JOINED + SOURCE if joined else SOURCE),
        header=whole_header(dtype, numbers, scale),
        # A copy of the planes would be written in their place. Strides are the kernel's business.
        ensure_row_contiguous=False,
        shared_memory=way.shared_memory,
    )
