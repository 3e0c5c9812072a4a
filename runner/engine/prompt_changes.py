"""The product of a prompt's tokens with each row's low-rank change, in three launches on CUDA.

The first is MLX's product, the second makes the tokens' inner products with their rows' slots, the third adds the
changes and what follows them, a residual sum or an MLP's gate, which would be read and written once more apart.
"""

from __future__ import annotations

import mlx.core as mx

from runner.engine.adapters import kernel, prompts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed


def fits(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack) -> bool:
    """Whether there are kernels for such changes to a weight [outputs, inputs] (of both parts, for "swiglu")."""
    shapes = (stack.b.shape[2], stack.down.shape[2]) == (outputs * kernel.parts(epilogue), inputs)
    return shapes and stack.down.dtype == dtype and prompts.fits(inputs, stack)


def applies(x: mx.array) -> bool:
    """Whether x [rows, tokens, in] has as many tokens a row as make this faster than one launch, token by token."""
    return x.ndim == 3 and x.shape[1] > kernel.MOST_TOKENS


def changed(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain") -> Changed:
    """The product with one weight in which each row has its own change, prepared."""
    prompts.prepare(inputs, dtype, epilogue)

    def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
        board = slots.board()
        inner = prompts.inner(x, weight, stack, board)
        return prompts.add(x @ weight.T, inner, stack, board, added, epilogue)

    return call
