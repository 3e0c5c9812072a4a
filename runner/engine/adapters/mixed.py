"""Changes of rows that have different adapters, by MLX's own products: which way, and what it is.

On the CPU one `gather_mm` takes every row's matrices by its slot. It is told the order of the rows too, in the type
that it looks for: else each of a layer's products begins with counting them, and a decode step's change takes twice as
long.

On CUDA that product is compiled on the way, for a minute and more, where rows have several tokens. There the rows are
multiplied by what all slots have, as one matrix, and each keeps the inner products of its own slot. It takes three
operations a layer, and copies nothing.
"""

from __future__ import annotations

from typing import Final, Literal

import mlx.core as mx

from runner.engine.adapters.stack import Stack

Way = Literal["together", "copied", "gathered"]
"""How changes are added: by the function of that name."""

_MOST_RANKS: Final = 256
"""Ranks of all slots up to which they are multiplied together on CUDA.

A rank is two operations for each value of a row that the first product reads (two bytes), and for each that the second
reads and writes (four). GPUs make some 200 operations in the time of a byte (an H200: 990 × 10¹² and 4.8 × 10¹² a
second), so up to about there both products take as long as their rows are to be read, which they are in any way. Beyond
that, copies of a few rows' matrices are less than what the others' ranks cost.
"""


def way(x: mx.array, stack: Stack) -> Way:
    """The one that suits the device, for x [rows, tokens, in]."""
    if not mx.cuda.is_available():
        return "gathered"
    slots, rank, _ = stack.down.shape
    if rank * (slots - 1) <= max(_MOST_RANKS, rank):
        return "together"
    return "copied" if x.shape[1] > 1 else "gathered"


def together(x: mx.array, y: mx.array, stack: Stack, own: mx.array) -> mx.array:
    """y [rows, tokens, out] plus the changes to x [rows, tokens, in], where `own` [rows, 1, slots · r] says which of
    `Stack.beside`'s ranks are those of a row's slot.

    What other slots make of a row is left out whatever it is; their `b` has to be finite.
    """
    a, b = stack.beside
    return mx.addmm(y, mx.where(own, x @ a, 0), b)


def copied(x: mx.array, y: mx.array, stack: Stack, slots: mx.array) -> mx.array:
    """The same by copies of the matrices of each row's slot; `slots` [rows]."""
    return mx.addmm(y, x @ stack.down[slots].swapaxes(-1, -2), stack.b[slots])


def gathered(x: mx.array, y: mx.array, stack: Stack, order: mx.array, slots: mx.array) -> mx.array:
    """The same by products that look for them; `order` [rows] counts the rows, and both are uint32."""
    inner = mx.gather_mm(x, stack.a, lhs_indices=order, rhs_indices=slots)
    return y + mx.gather_mm(inner, stack.b, lhs_indices=order, rhs_indices=slots)
