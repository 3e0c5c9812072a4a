"""Linear layers that add each row's own low-rank change.

One `gather_mm` picks every row's matrices by its slot, so a batch with any mix of adapters costs two products a layer.
While no row of the batch has an adapter, a wrapped layer is its base and nothing else.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.engine.adapters.stack import Stack


class RowSlots:
    """Which adapter each row of the running model call has. All wrapped layers of a model share one.

    `slots` is [rows] int32, 0 for none; None when no row has an adapter.
    """

    __slots__ = ("slots",)

    def __init__(self) -> None:
        self.slots: mx.array | None = None


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, and its stack while a resident adapter changes it."""

    def __init__(self, base: Any, rows: RowSlots) -> None:
        super().__init__()
        self.base = base
        self.stack: Stack | None = None
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        """x is [rows, …, in], or [rows · tokens, in]."""
        y: mx.array = self.base(x)
        if self.stack is None or (slots := self._rows.slots) is None:
            return y
        return self._adapt(self.stack, x, y, slots)

    def _adapt(self, stack: Stack, x: mx.array, y: mx.array, slots: mx.array) -> mx.array:
        flat = x.ndim == 2
        if flat:
            # Some models join rows and tokens into one axis.
            slots = mx.repeat(slots, x.shape[0] // slots.shape[0])
            x = x[:, None]
        elif x.ndim > 3:
            slots = slots.reshape(-1, *[1] * (x.ndim - 3))
        change = mx.gather_mm(x, stack.a, rhs_indices=slots)
        change = mx.gather_mm(change, stack.b, rhs_indices=slots)
        change = (change[:, 0] if flat else change).astype(y.dtype)
        if stack.magnitude is None:
            return y + change
        factor = stack.magnitude[slots]
        factor = factor if flat else mx.expand_dims(factor, -2)
        bias: mx.array | None = self.base.get("bias")
        if bias is None:
            return (y + change) * factor
        return (y - bias + change) * factor + bias

    @property
    def weight(self) -> mx.array:
        """The base's: some models look at its type."""
        weight: mx.array = self.base.weight
        return weight
