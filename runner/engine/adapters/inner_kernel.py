"""The inner products of prompts' tokens with `down` of their rows' slots, in one launch on CUDA.

cuBLAS would multiply them with all slots', which takes the host three times as long to call, and another operation to
keep those of the row's own.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.adapters.inner_source import BODY
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import KINDS, Kernel
from runner.engine.tensor_cores import DEVICE

_WARPS: Final = 8
_TILES: Final = 4
_CHUNK: Final = 64
_RANKS: Final = 16


def fits(inputs: int, stack: Stack) -> bool:
    """Whether there is a kernel for such changes of layers with so many inputs: 16-bit, in whole chunks."""
    return stack.packed is not None and stack.down.dtype in KINDS and inputs % _CHUNK == 0


def inner(x: mx.array, weight: mx.array, stack: Stack, board: mx.array) -> mx.array:
    """[1, rows · tokens, slots, ranks] float32, of which those of a token's own slot are written, none for slot 0.

    x is [rows, tokens, in], `weight` the layer's [out, in], for its shape, `board` one of the rows'.
    """
    rows, tokens, _ = x.shape
    slots, ranks, _ = stack.down.shape
    blocks = rows * -(-tokens // (_TILES * 8)) * -(-ranks // _RANKS)
    result: mx.array = kernel(x.dtype).launch(
        inputs=[x, weight, stack.packed, board],
        grid=(blocks * _WARPS * 32, 1, 1),
        threadgroup=(_WARPS * 32, 1, 1),
        output_shapes=[(1, rows * tokens, slots, ranks)],
        output_dtypes=[mx.float32],
    )[0]
    return result


def constants(dtype: mx.Dtype, warps: int = _WARPS) -> str:
    """What the source does not say."""
    kind, operand = KINDS[dtype]
    return f'using T = {kind};\n#define KIND "{operand}"\nconstexpr int WARPS = {warps}, TILES = {_TILES};\n'


def source() -> str:
    """The kernel's text."""
    return cuda_kernels.terse(BODY)


def inputs_of(dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    return {"x": dtype, "w": dtype, "changes": dtype, "board": mx.int32}


@cache
def kernel(dtype: mx.Dtype) -> Kernel:
    """Begins to be compiled when it is first wanted."""
    return Kernel(
        name=f"inner_{KINDS[dtype][1]}",
        inputs=inputs_of(dtype),
        outputs={"out": mx.float32},
        source=source(),
        header=constants(dtype) + DEVICE,
        shared_memory=_WARPS * _TILES * 128 * 4,
    )
