"""Layers of experts that add each row's own low-rank change, one pair of matrices an expert.

Upstream's mixture blocks send every token to some experts and may sort tokens by expert first, so a layer inside cannot
tell which row a token belongs to. The wrapped block can: it leaves that here for its layers.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.engine.adapters.layers import CurrentSlots
from runner.engine.adapters.stack import Stack


class RoutedSlots:
    """The slot of every (token, expert) pair of the block that runs now; shared by a block and its layers."""

    def __init__(self) -> None:
        self._plain: mx.array | None = None
        self._indices: mx.array | None = None
        self._sorted: mx.array | None = None

    def set(self, slots: mx.array, indices: mx.array) -> None:
        """`slots` [rows] for `indices` [rows, …, experts per token], or [rows · tokens, experts per token]."""
        self._indices, self._sorted = indices, None
        self._plain = mx.repeat(slots, indices.size // slots.shape[0]).reshape(indices.shape)

    def clear(self) -> None:
        """The block is done."""
        self._plain = self._indices = self._sorted = None

    def get(self, *, by_expert: bool) -> mx.array | None:
        """Slots in the order of the tokens, or flat and in upstream's order by expert; None when no row has any."""
        if self._plain is None or not by_expert:
            return self._plain
        if self._sorted is None:
            assert self._indices is not None
            self._sorted = self._plain.flatten()[mx.argsort(self._indices.flatten())]
        return self._sorted


class AdaptedExperts(nn.Module):  # type: ignore[misc]
    """A mixture block (upstream's SwitchGLU or SwitchMLP) that tells its layers which rows their tokens are of."""

    def __init__(self, base: Any, current: CurrentSlots) -> None:
        super().__init__()
        self.base = base
        self.routed = RoutedSlots()
        self._current = current

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """As the base."""
        rows = self._current.rows
        if rows is None:
            return self._base(x, indices)
        self.routed.set(rows.slots, indices)
        y = self._base(x, indices)
        self.routed.clear()
        return y

    def _base(self, x: mx.array, indices: mx.array) -> mx.array:
        y: mx.array = self.base(x, indices)
        return y


class AdaptedSwitchLinear(nn.Module):  # type: ignore[misc]
    """A layer of experts, and its stack ([slots, experts, …]) while a resident adapter changes it."""

    def __init__(self, base: Any, routed: RoutedSlots) -> None:
        super().__init__()
        self.base = base
        self.stack: Stack | None = None
        self._routed = routed

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As the base: `indices` name the expert of every row of `x` [..., 1, in]."""
        y: mx.array = self.base(x, indices, sorted_indices=sorted_indices)
        if self.stack is None or (slots := self._routed.get(by_expert=sorted_indices)) is None:
            return y
        pairs = slots * self.stack.b.shape[1] + indices
        change = mx.gather_mm(x, self.stack.a.flatten(0, 1), rhs_indices=pairs)
        change = mx.gather_mm(change, self.stack.b.flatten(0, 1), rhs_indices=pairs)
        return y + change.astype(y.dtype)
