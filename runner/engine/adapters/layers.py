"""Linear layers that add each row's own low-rank change.

A batch with any mix of adapters costs two products and what picks each row's matrices for them (`mixed.py`). Where all
rows have the same adapter they are plain products, and the last of them also adds. On CUDA a decode step may have a
kernel of its own (`kernel.py`). While no row of the batch has an adapter, a wrapped layer is its base and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import cycle
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
import msgspec

from runner.engine import cuda_kernels
from runner.engine.adapters import kernel, mixed
from runner.engine.adapters.stack import Stack

_AT_ONCE: Final = 8
"""Layers of one model call that may be computed at the same time: those that do not need each other's results."""

_LINE: Final = 32
"""Integers: a line of the cache."""

ROOM: Final = 32 * 512
"""Inner products that the blocks of a launch may leave for others."""


class RowSlots(msgspec.Struct, frozen=True):
    """Which adapter each row of a model call has: `slots` [rows] int32, 0 for none. `only` is the slot that all rows
    share, or None.

    `boards` are all that a launch needs of that as one array: two counters, zeros that it leaves as they were; from the
    second line on the slots; and from the line after those on ROOM places to write to. Their shape, [rows, …], is for
    the sake of the number. They are the rows' own, since calls for other rows may be computed at the same time.
    """

    slots: mx.array
    only: int | None
    _numbers: tuple[int, ...] = ()
    _boards: list[tuple[mx.array, ...]] = msgspec.field(default_factory=list)
    _turns: list[Iterator[mx.array]] = msgspec.field(default_factory=list)
    _places: list[tuple[mx.array, mx.array]] = msgspec.field(default_factory=list)
    _own: dict[tuple[int, int], mx.array] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, numbers: list[int]) -> RowSlots:
        """The rows' slots by their numbers."""
        only = numbers[0] if len(set(numbers)) == 1 else None
        return cls(mx.array(numbers, dtype=mx.int32), only, tuple(numbers))

    @property
    def boards(self) -> tuple[mx.array, ...]:
        """Made when they are first wanted: of rows that pad a graph, or of those without, only one kind is."""
        if not self._boards:
            wanted = self._numbers and cuda_kernels.usable(kernel.SWITCH)
            self._boards.append(boards_of([*self._numbers]) if wanted else ())
        return self._boards[0]

    @property
    def arrays(self) -> list[mx.array]:
        """What `of_arrays` takes."""
        return [self.slots, *self.boards]

    @classmethod
    def of_arrays(cls, arrays: list[mx.array], only: int | None) -> RowSlots:
        """The same, or what stands for it in a graph."""
        return cls(arrays[0], only, _boards=[tuple(arrays[1:])])

    @property
    def places(self) -> tuple[mx.array, mx.array]:
        """The rows' numbers and their slots, as a gathering product takes them. Made once."""
        if not self._places:
            self._places.append((mx.arange(self.slots.shape[0], dtype=mx.uint32), self.slots.astype(mx.uint32)))
        return self._places[0]

    def own(self, stack: Stack) -> mx.array:
        """Which of the ranks of `stack.beside` are those of a row's slot, [rows, 1, slots · r] bool. Made once for all
        stacks of a shape."""
        slots, rank, _ = stack.down.shape
        if (slots, rank) not in self._own:
            its = mx.arange(1, slots) == self.slots[:, None]
            self._own[slots, rank] = mx.repeat(its, rank, axis=1)[:, None]
        return self._own[slots, rank]

    def board(self) -> mx.array:
        """One for a launch."""
        if not self._turns:
            self._turns.append(cycle(self.boards))
        return next(self._turns[0])


def boards_of(numbers: list[int], count: int = _AT_ONCE) -> tuple[mx.array, ...]:
    """For rows of such slots."""
    rows = len(numbers)
    lines = [0] * _LINE + numbers + [0] * (-rows % _LINE)
    room = ROOM + -(len(lines) + ROOM) % rows
    one = mx.concatenate([mx.array(lines, dtype=mx.int32), mx.zeros((room,), mx.int32)])
    # Each has to be memory of its own.
    several = mx.contiguous(mx.broadcast_to(one, (count, one.size)))
    return tuple(board.reshape(rows, -1) for board in mx.split(several, count))


class CurrentSlots:
    """The slots of the model call that is being built. All wrapped layers of a model share one."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: RowSlots | None = None


class ChangingLinear(nn.Linear, ABC):  # type: ignore[misc]
    """A linear layer that can have each row's change in its own product."""

    @abstractmethod
    def changed(self, x: mx.array, stack: Stack, rows: RowSlots) -> mx.array | None:
        """What an AdaptedLinear over it gives, [rows, …, out], or None where that is to be computed apart."""

    @abstractmethod
    def prepare(self, stack: Stack) -> None:
        """For changes such as those of a stack."""

    @abstractmethod
    def takes_all(self, stack: Stack) -> bool:
        """Whether it has them in products of any number of tokens."""


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, and its stack while a resident adapter changes it."""

    def __init__(self, base: Any, current: CurrentSlots) -> None:
        super().__init__()
        self.base = base
        self.stack: Stack | None = None
        self._current = current

    def __call__(self, x: mx.array) -> mx.array:
        """x is [rows, …, in], or [rows · tokens, in]."""
        if (change := self.change) is None:
            y: mx.array = self.base(x)
            return y
        stack, rows = change
        if isinstance(self.base, ChangingLinear) and (whole := self.base.changed(x, stack, rows)) is not None:
            return whole
        return self._apart(x, self.base(x), stack, rows)

    def prepare(self) -> None:
        """To be called when the stack has changed."""
        if self.stack is None:
            return
        kernel.prepare(self.stack)
        if isinstance(self.base, ChangingLinear):
            self.base.prepare(self.stack)

    @property
    def alike(self) -> bool:
        """Whether rows of one adapter are computed as those of several are."""
        return self.stack is None or (isinstance(self.base, ChangingLinear) and self.base.takes_all(self.stack))

    def _apart(self, x: mx.array, y: mx.array, stack: Stack, rows: RowSlots) -> mx.array:
        if kernel.applies(x, stack) and y.dtype == x.dtype:
            return kernel.add_changes(x, y, stack, rows.board())
        if rows.only is not None:
            a, b, factor = stack.slot(rows.only)
            return self._scaled(mx.addmm(y, x @ a, b), factor)
        return self._adapt_each(stack, x, y, rows)

    def _adapt_each(self, stack: Stack, x: mx.array, y: mx.array, rows: RowSlots) -> mx.array:
        if x.ndim != 3:
            # Some models join rows and tokens into one axis, others have several of tokens.
            count = rows.slots.shape[0]
            by_row = self._adapt_each(stack, x.reshape(count, -1, x.shape[-1]), y.reshape(count, -1, y.shape[-1]), rows)
            return by_row.reshape(y.shape)
        match mixed.way(x, stack):
            case "together":
                changed = mixed.together(x, y, stack, rows.own(stack))
            case "copied":
                changed = mixed.copied(x, y, stack, rows.slots)
            case "gathered":
                changed = mixed.gathered(x, y, stack, *rows.places)
        changed = changed.astype(y.dtype)
        factor = None if stack.magnitude is None else stack.magnitude[rows.slots][:, None]
        return self._scaled(changed, factor)

    def _scaled(self, y: mx.array, factor: mx.array | None) -> mx.array:
        """y with DoRA's factor, from which the bias is exempt."""
        if factor is None:
            return y
        bias: mx.array | None = self.base.get("bias")
        return y * factor if bias is None else (y - bias) * factor + bias

    @property
    def change(self) -> tuple[Stack, RowSlots] | None:
        """What changes the base in the call that is being built, if anything does."""
        rows = self._current.rows
        return None if self.stack is None or rows is None else (self.stack, rows)

    @property
    def weight(self) -> mx.array:
        """The base's: some models look at its type."""
        weight: mx.array = self.base.weight
        return weight
