"""Low-rank changes of prompts' tokens to a layer's product, in two launches on CUDA: `inner`, then `add`.

cuBLAS would multiply tokens with all slots' ranks, which takes the host three times as long to call, and another
operation to keep those of a row's own; and what follows the sum, a residual sum or an MLP's gate, would read and write
the product once more.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.prompts_source import ADD, INNER, PLACES
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel
from runner.engine.product_source import SWIGLU
from runner.engine.tensor_cores import DEVICE

_TILES: Final = 2
_STAGES: Final = 3
_CHUNK: Final = 64
_RANKS: Final = 16
_OUTPUTS: Final = 32
_LONG: Final = 4096

WARPS: Final = 8
"""Of a block; twice as many share more than _LONG inputs."""

_TOKENS, _MOST_TOKENS = 64, 256
"""That a warp adds changes to, at least and at most; shorter rows have fewer."""

BLOCKS: Final = 2 * PROCESSORS
"""That run at once."""


def fits(inputs: int, stack: Stack) -> bool:
    """Whether there are kernels for such changes of a layer with so many inputs: 16-bit, in whole chunks."""
    return (
        stack.packed is not None
        and stack.down.dtype in KINDS
        and inputs % _CHUNK == 0
        and all(end % _OUTPUTS == 0 for end, _, _ in stack.spans[0])
    )


def inner(x: mx.array, weight: mx.array, stack: Stack, board: mx.array) -> mx.array:
    """[rows · tokens, ranks] float32: inner products with `down` of each row's slot, nothing written for slot 0.

    x is [rows, tokens, in], `weight` the layer's [out, in], for its shape, `board` one of the rows'.
    """
    rows, tokens, inputs = x.shape
    ranks, warps = stack.down.shape[1], warps_of(inputs)
    blocks = rows * -(-tokens // (_TILES * 8)) * -(-ranks // _RANKS)
    result: mx.array = inner_kernel(x.dtype, warps).launch(
        inputs=[x, weight, stack.packed, board],
        grid=(blocks * warps * 32, 1, 1),
        threadgroup=(warps * 32, 1, 1),
        output_shapes=[(rows * tokens, ranks)],
        output_dtypes=[mx.float32],
    )[0]
    return result


def add(
    y: mx.array, inner: mx.array, stack: Stack, board: mx.array, added: mx.array | None, epilogue: str = "plain"
) -> mx.array:
    """y plus each row's change, plus what is `added`; for "swiglu" a gate and an MLP's input made one.

    y is [rows, tokens, out], `inner` as the function of that name gives it. The result is of y's shape, or half as
    wide for "swiglu".
    """
    rows, tokens, outputs = y.shape
    outputs //= parts(epilogue)
    rest = [] if epilogue == "swiglu" else [_nothing(y.dtype) if added is None else added]
    blocks = adding_blocks(rows, tokens, outputs)
    result: mx.array = add_kernel(y.dtype, epilogue).launch(
        inputs=[y, inner, *rest, stack.packed, board],
        grid=(blocks * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(rows, tokens, outputs)],
        output_dtypes=[y.dtype],
    )[0]
    return result


def prepare(inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    """Begin to compile."""
    inner_kernel(dtype, warps_of(inputs))
    add_kernel(dtype, epilogue)
    if epilogue == "plain":
        _nothing(dtype)


def adding_blocks(rows: int, tokens: int, outputs: int, warps: int = WARPS, blocks: int = BLOCKS) -> int:
    """Of `add`, each of so many warps, where `blocks` run at once."""
    shares, step = -(-outputs // (_OUTPUTS * warps)), _MOST_TOKENS
    while step > _TOKENS and rows * -(-tokens // step) * shares < blocks:
        step //= 2
    return rows * -(-tokens // step) * shares


def warps_of(inputs: int) -> int:
    """That share the inputs."""
    return 2 * WARPS if inputs > _LONG else WARPS


def source(epilogue: str | None) -> str:
    """A kernel's text, that of `inner` for None."""
    return cuda_kernels.terse(INNER if epilogue is None else cuda_kernels.filled(ADD, PLACES[epilogue]))


def constants(dtype: mx.Dtype, epilogue: str | None, warps: int = WARPS, blocks: int = BLOCKS) -> str:
    """What the source does not say."""
    kind, operand = KINDS[dtype]
    return (
        f'using T = {kind};\n#define KIND "{operand}"\nconstexpr int WARPS = {warps}, TILES = {_TILES};\n'
        f"constexpr int STAGES = {_STAGES};\n"
        f"constexpr int TOKENS = {_TOKENS}, MOST_TOKENS = {_MOST_TOKENS}, BLOCKS = {blocks};\n"
        f"constexpr int PARTS = {parts(epilogue or 'plain')};\n"
    )


def header(dtype: mx.Dtype, epilogue: str | None, warps: int = WARPS) -> str:
    """What comes before it."""
    return constants(dtype, epilogue, warps) + DEVICE + (SWIGLU if epilogue == "swiglu" else "")


def inputs_of(epilogue: str | None, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    if epilogue is None:
        return {"x": dtype, "w": dtype, "changes": dtype, "board": mx.int32}
    rest = {} if epilogue == "swiglu" else {"added": dtype}
    return {"y": dtype, "inner": mx.float32, **rest, "changes": dtype, "board": mx.int32}


@cache
def inner_kernel(dtype: mx.Dtype, warps: int) -> Kernel:
    """Begins to be compiled when it is first wanted."""
    return Kernel(
        name=f"prompts_inner_{KINDS[dtype][1]}_{warps}",
        inputs=inputs_of(None, dtype),
        outputs={"out": mx.float32},
        source=source(None),
        header=header(dtype, None, warps),
        shared_memory=warps * _STAGES * (4 + 2 * _TILES) * 32 * 16,
    )


@cache
def add_kernel(dtype: mx.Dtype, epilogue: str) -> Kernel:
    """Begins to be compiled when it is first wanted."""
    return Kernel(
        name=f"prompts_add_{epilogue}_{KINDS[dtype][1]}",
        inputs=inputs_of(epilogue, dtype),
        outputs={"out": dtype},
        source=source(epilogue),
        header=header(dtype, epilogue),
    )


@cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    none = mx.zeros((1,), dtype)
    mx.eval(none)
    return none
