"""The product of up to 128 tokens with each row's low-rank change, in two launches on Hopper GPUs.

The first is the product, which has the inner products of all slots as more outputs; the second adds the changes, and
what follows them.
"""

from __future__ import annotations

import mlx.core as mx

from runner.engine import wide_product_kernel
from runner.engine.adapters import expand
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed


def fits(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack) -> bool:
    """Whether there are kernels for such changes to a weight [outputs, inputs] (of both parts, for "swiglu")."""
    return expand.fits(stack) and wide_product_kernel.fits_inner(outputs * parts(epilogue), inputs, dtype, stack)


def changed(
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str = "plain",
    choose: wide_product_kernel.Choose = wide_product_kernel.way,
) -> Changed:
    """The product with one weight in which each row has its own change, prepared."""
    multiply = wide_product_kernel.with_inner(outputs * parts(epilogue), inputs, dtype, choose)
    expand.prepare(dtype, epilogue)
    nothing = mx.zeros((1,), dtype)
    mx.eval(nothing)

    def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
        y, inner = multiply(x, weight, stack)
        return expand.expand(y, inner, stack, slots.board(), nothing if added is None else added, epilogue)

    return call
