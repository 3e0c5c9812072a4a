"""Linear layers that add each row's own low-rank change.

One `gather_mm` picks every row's matrices by its slot, so a batch with any mix of adapters costs two products a layer.
Where all rows have the same adapter they are plain products, and the last of them also adds. On CUDA a decode step may
have a kernel of its own (`kernel.py`). While no row of the batch has an adapter, a wrapped layer is its base and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.engine.adapters import kernel
from runner.engine.adapters.stack import Stack


@dataclass(frozen=True, slots=True)
class RowSlots:
    """Which adapter each row of a model call has: `slots` [rows] int32, 0 for none. `only` is the slot that all rows
    share, or None."""

    slots: mx.array
    only: int | None


class CurrentSlots:
    """The slots of the model call that is being built. All wrapped layers of a model share one."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: RowSlots | None = None


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, and its stack while a resident adapter changes it."""

    def __init__(self, base: Any, current: CurrentSlots) -> None:
        super().__init__()
        self.base = base
        self.stack: Stack | None = None
        self._current = current

    def __call__(self, x: mx.array) -> mx.array:
        """x is [rows, …, in], or [rows · tokens, in]."""
        y: mx.array = self.base(x)
        if self.stack is None or (rows := self._current.rows) is None:
            return y
        if kernel.applies(x, self.stack):
            return kernel.add_changes(x, y, self.stack, rows.slots)
        if rows.only is not None:
            a, b, factor = self.stack.slot(rows.only)
            return self._scaled(mx.addmm(y, x @ a, b), factor)
        return self._adapt_each(self.stack, x, y, rows.slots)

    def _adapt_each(self, stack: Stack, x: mx.array, y: mx.array, slots: mx.array) -> mx.array:
        flat = x.ndim == 2
        if flat:
            # Some models join rows and tokens into one axis.
            slots = mx.repeat(slots, x.shape[0] // slots.shape[0])
            x = x[:, None]
        elif x.ndim > 3:
            slots = slots.reshape(-1, *[1] * (x.ndim - 3))
        change = mx.gather_mm(x, stack.a, rhs_indices=slots)
        change = mx.gather_mm(change, stack.b, rhs_indices=slots)
        y = y + (change[:, 0] if flat else change).astype(y.dtype)
        if stack.magnitude is None:
            return y
        factor = stack.magnitude[slots]
        return self._scaled(y, factor if flat else mx.expand_dims(factor, -2))

    def _scaled(self, y: mx.array, factor: mx.array | None) -> mx.array:
        """y with DoRA's factor, from which the bias is exempt."""
        if factor is None:
            return y
        bias: mx.array | None = self.base.get("bias")
        return y * factor if bias is None else (y - bias) * factor + bias

    @property
    def unchanged(self) -> Any | None:
        """The base, where it is all that the call that is being built computes here."""
        return self.base if self.stack is None or self._current.rows is None else None

    @property
    def weight(self) -> mx.array:
        """The base's: some models look at its type."""
        weight: mx.array = self.base.weight
        return weight
