"""The product of few tokens with a layer's weight, in one launch on CUDA.

With 2 to 32 rows such a product is bound by reading the weight, and cuBLAS takes the host longer to call (20 µs) than
the device to compute it. This kernel is called in half of that, of which the greater part is gone where the step's
graph is compiled; it reads the weight once, at the memory's speed; and its epilogues save the operations that follow:
the sum with what the block began with, and an MLP's gate. One row takes it as well, and a row's result is the same
bits in any batch of up to MOST_ROWS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.adapters.layers import ROOM, RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.changed_source import CHANGED, CHANGED_DEVICE
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel, Size
from runner.engine.product_source import BODY, GATE, PLAIN, STORES, SWIGLU
from runner.engine.tensor_cores import DEVICE

SWITCH: Final = "MLX_RUN_PRODUCT_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

MOST_ROWS: Final = 32
"""Tokens in a call up to which the kernel is used. With 64 the device takes twice as long for it as for cuBLAS, and a
step is longer than one of 128 rows."""

TILES: Final = (1, 2, 4)
"""How many eights of rows there is a kernel for."""

RANKS: Final = 8
"""How many ranks of a row's change one block computes the inner products of."""

GATE_THREADS: Final = 256

_TILE: Final = 16
_CHUNK: Final = 64
_WARP: Final = 32


class Way(msgspec.Struct, frozen=True):
    """How a product is shared out: `warps` a block, `stages` chunks of weights on their way to a warp, `mtiles` × 16
    lines of weights a block. `warps` is the only one that the order of a sum depends on."""

    warps: int
    stages: int
    mtiles: int

    @property
    def shared_memory(self) -> int:
        """Bytes of it that a block has."""
        return self.warps * self.stages * self.mtiles * _TILE * _CHUNK * 2


def way(outputs: int, inputs: int, tiles: int, epilogue: str) -> Way:
    """For a weight [outputs, inputs] (of a gate, and as many of its input, for "swiglu"); `warps` does not depend on
    `tiles`."""
    blocks = outputs // _TILE
    if epilogue == "swiglu":
        return Way(8, 1 if tiles == 4 else 2, 2)
    if blocks <= PROCESSORS and inputs >= 16 * _CHUNK:
        # Fewer blocks than there are processors, so each has to have much on its way.
        return Way(16, 2, 1)
    if blocks <= 3 * PROCESSORS or outputs % (2 * _TILE):
        return Way(8, 2, 1)
    return Way(8, 1 if tiles == 4 else 2, 2)


def fits(outputs: int, inputs: int, dtype: mx.Dtype) -> bool:
    """Whether there is a kernel for a weight [outputs, inputs]: 16-bit, in whole tiles."""
    return dtype in KINDS and outputs % _TILE == 0 and inputs % _CHUNK == 0


Choose = Callable[[int, int, int, str], Way]

Multiply = Callable[..., mx.array]
"""From tokens [..., inputs], of at most MOST_ROWS in all, and the weight [outputs, inputs] to [..., outputs]. A third
array, [..., outputs] of the tokens' type, is added to the rounded product. For "swiglu" the weight is [2 · outputs,
inputs], and there is no third."""


def multiply(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain", choose: Choose = way) -> Multiply:
    """The product with one weight, prepared: a call costs the host little."""
    by_rows = _by_rows(outputs, inputs, dtype, epilogue, choose)
    dtypes, rest = [dtype], no_sum(dtype, epilogue)

    def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        kernel, grid, threads = by_rows[x.size // inputs]
        result: mx.array = kernel.launch(
            inputs=[x, weight, *rest] if added is None else [x, weight, added],
            grid=grid,
            threadgroup=threads,
            output_shapes=[(*x.shape[:-1], outputs)],
            output_dtypes=dtypes,
        )[0]
        return result

    return call


Changed = Callable[[mx.array, mx.array, mx.array | None, Stack, RowSlots], mx.array]
"""From tokens [rows, tokens, inputs], the weight, what is to be added (or None), and each row's change and slot."""


def fits_changes(outputs: int, inputs: int, dtype: mx.Dtype, stack: Stack) -> bool:
    """Whether there is a kernel for such changes to a weight [outputs, inputs] (of both parts, for "swiglu")."""
    down, b = stack.down, stack.b
    return (
        stack.packed is not None
        and down.dtype == b.dtype == dtype
        and 0 < down.shape[1] <= ROOM // MOST_ROWS
        and (b.shape[2], down.shape[2]) == (outputs, inputs)
        and all(end % _TILE == 0 for end, _, _ in stack.spans[0])
    )


def changed(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain", choose: Choose = way) -> Changed:
    """The product with one weight in which each row has its own low-rank change, prepared."""
    by_rows = _by_rows(outputs, inputs, dtype, epilogue, choose, changes=True)
    dtypes, rest = [dtype], no_sum(dtype, epilogue)

    def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
        rows = x.size // inputs
        kernel, (width, _, _), threads = by_rows[rows]
        first = rows * -(-stack.down.shape[1] // RANKS) * threads[0]
        result: mx.array = kernel.launch(
            inputs=[x, weight, *(rest if added is None else (added,)), stack.packed, slots.board()],
            grid=(first + width, 1, 1),
            threadgroup=threads,
            output_shapes=[(*x.shape[:-1], outputs)],
            output_dtypes=dtypes,
        )[0]
        return result

    return call


def no_sum(dtype: mx.Dtype, epilogue: str) -> list[mx.array]:
    """What a kernel gets in the place of what is to be added: one kernel is both with and without a sum, since each
    takes a second to compile, and a single axis is none."""
    given = [] if epilogue == "swiglu" else [mx.zeros((1,), dtype)]
    mx.eval(given)
    return given


def _by_rows(
    outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose, *, changes: bool = False
) -> list[tuple[Kernel, Size, Size]]:
    """What `_prepare` has for each number of rows."""
    ways = {tiles: choose(outputs, inputs, tiles, epilogue) for tiles in TILES}
    prepared = [_prepare(outputs, way, tiles, dtype, epilogue, changes=changes) for tiles, way in ways.items()]
    return [prepared[sum(rows > 8 * tiles for tiles in TILES[:-1])] for rows in range(MOST_ROWS + 1)]


def gate(y: mx.array) -> mx.array:
    """What is between an MLP's input and its output, [..., n], from the product of its gate and input [..., 2 · n].

    To the bit as within such a product. n is a multiple of 8.
    """
    result: mx.array = _gate_kernel(y.dtype).launch(
        inputs=[y],
        grid=(y.size // 16, 1, 1),
        threadgroup=(GATE_THREADS, 1, 1),
        output_shapes=[(*y.shape[:-1], y.shape[-1] // 2)],
        output_dtypes=[y.dtype],
    )[0]
    return result


def usable() -> bool:
    """Whether there is a device for it, and the switch is not off."""
    return cuda_kernels.usable(SWITCH)


def source(epilogue: str, *, changes: bool = False) -> str:
    """The kernel's text."""
    text = cuda_kernels.filled(BODY, CHANGED if changes else PLAIN)
    return cuda_kernels.terse(cuda_kernels.filled(text, {"STORE": STORES[epilogue]}))


def constants(way: Way, tiles: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What the source does not say."""
    kind, operand = KINDS[dtype]
    parts = 2 if epilogue == "swiglu" else 1
    return (
        f'using T = {kind};\n#define KIND "{operand}"\n'
        f"constexpr int WARPS = {way.warps}, STAGES = {way.stages}, MTILES = {way.mtiles};\n"
        f"constexpr int TILES = {tiles}, PARTS = {parts}, RANKS = {RANKS};\n"
    )


def header(way: Way, tiles: int, dtype: mx.Dtype, epilogue: str, *, changes: bool = False) -> str:
    """What comes before it."""
    texts = [constants(way, tiles, dtype, epilogue), DEVICE]
    texts += [SWIGLU] if epilogue == "swiglu" else []
    return "".join([*texts, CHANGED_DEVICE] if changes else texts)


def inputs_of(epilogue: str, *, changes: bool = False) -> list[str]:
    """What the source calls a call's arrays."""
    names = ["x", "w"] if epilogue == "swiglu" else ["x", "w", "added"]
    return [*names, "changes", "board"] if changes else names


def _prepare(
    outputs: int, way: Way, tiles: int, dtype: mx.Dtype, epilogue: str, *, changes: bool = False
) -> tuple[Kernel, Size, Size]:
    """The kernel, the grid of its blocks that multiply, and its block."""
    parts = 2 if epilogue == "swiglu" else 1
    assert outputs % (_TILE * way.mtiles // parts) == 0
    threads = way.warps * _WARP
    blocks = outputs * parts // (_TILE * way.mtiles)
    return _kernel(way, tiles, dtype, epilogue, changes), (blocks * threads, 1, 1), (threads, 1, 1)


@cache
def _kernel(way: Way, tiles: int, dtype: mx.Dtype, epilogue: str, changes: bool) -> Kernel:
    sizes = f"{way.warps}_{way.stages}_{way.mtiles}_{tiles}"
    return Kernel(
        name=f"{'changed' if changes else 'product'}_{epilogue}_{KINDS[dtype][1]}_{sizes}",
        inputs={name: mx.int32 if name == "board" else dtype for name in inputs_of(epilogue, changes=changes)},
        outputs={"out": dtype},
        source=source(epilogue, changes=changes),
        header=header(way, tiles, dtype, epilogue, changes=changes),
        shared_memory=way.shared_memory,
    )


def gate_header(dtype: mx.Dtype) -> str:
    """What comes before GATE."""
    return f"using T = {KINDS[dtype][0]};\nconstexpr int THREADS = {GATE_THREADS};\n"


@cache
def _gate_kernel(dtype: mx.Dtype) -> Kernel:
    return Kernel(
        name=f"gate_{KINDS[dtype][1]}",
        inputs={"y": dtype},
        outputs={"out": dtype},
        source=cuda_kernels.terse(GATE),
        header=gate_header(dtype) + SWIGLU,
    )
