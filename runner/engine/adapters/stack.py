"""The stacked changes of all resident adapters to one layer, and how adapters enter and leave them."""

from __future__ import annotations

from typing import Final

import mlx.core as mx
import msgspec

Span = tuple[int, int, int]
"""Where a part of the outputs ends, and the ranks [low, high) that reach it."""

LINE: Final = 64
"""Values of 16 bits, 32 integers: a line of the cache."""


class Change(msgspec.Struct, frozen=True):
    """One adapter's change to a layer, or to several that are computed as one.

    `a` is [in, r] and `b` [r, out] (both with an axis of experts in front for a layer of experts), `factor` [out] is
    DoRA's, None where there is none. `spans` has an entry for each part of the outputs.
    """

    a: mx.array
    b: mx.array
    factor: mx.array | None
    spans: tuple[Span, ...]

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[-1])


class Stack(msgspec.Struct, frozen=True):
    """`down` is [slots, r, in] and `b` [slots, r, out], with an axis of experts after the slots for a layer of experts.

    `magnitude` [slots, out] is the DoRA factor of each output, ones for other adapters, None while no resident adapter
    is DoRA. `spans` are those of the slots. Slot 0 changes nothing.

    `packed` is all that a kernel needs as one array, since each costs a launch: the slots' spans, a line of int32 each,
    `down` and `b`, which are views of it, behind each other. Its shape, [slots, LINE + r · (in + out)], is for the sake
    of the numbers. None where there are no kernels: for experts, DoRA, and other than 16 bits.
    """

    down: mx.array
    b: mx.array
    magnitude: mx.array | None
    spans: tuple[tuple[Span, ...], ...]
    packed: mx.array | None = None
    _slices: dict[int, tuple[mx.array, mx.array, mx.array | None]] = msgspec.field(default_factory=dict)
    _turned: list[mx.array] = msgspec.field(default_factory=list)
    _beside: list[tuple[mx.array, mx.array]] = msgspec.field(default_factory=list)

    @classmethod
    def of(cls, down: mx.array, b: mx.array, magnitude: mx.array | None, spans: tuple[tuple[Span, ...], ...]) -> Stack:
        """Packed, where that is of use."""
        parts = len(spans[0])
        if b.ndim != 3 or b.dtype.size != 2 or magnitude is not None or 6 * parts > LINE:
            return cls(down, b, magnitude, spans)
        lines = mx.pad(mx.array(spans, dtype=mx.int32).reshape(len(spans), -1), [(0, 0), (0, LINE // 2 - 3 * parts)])
        flat = mx.concatenate([lines.view(b.dtype).flatten(), down.flatten(), b.flatten()])
        first, second = lines.size * 2, lines.size * 2 + down.size
        views = flat[first:second].reshape(down.shape), flat[second:].reshape(b.shape)
        return cls(*views, None, spans, flat.reshape(len(spans), -1))

    @classmethod
    def empty(cls, slots: int, like: Change) -> Stack:
        """`slots` slots that change nothing, of the shapes of a change."""
        down = mx.zeros((slots, *like.a.swapaxes(-1, -2).shape), like.a.dtype)
        b = mx.zeros((slots, *like.b.shape), like.b.dtype)
        return cls.of(down, b, None, (_no_spans(like.spans),) * slots)

    @property
    def a(self) -> mx.array:
        """[slots, in, r]: the first product. A view, made once."""
        if not self._turned:
            self._turned.append(self.down.swapaxes(-1, -2))
        return self._turned[0]

    @property
    def beside(self) -> tuple[mx.array, mx.array]:
        """`a` and `b` of all slots but the first side by side, [in, slots · r] and [slots · r, out]. Views, made once.

        Not for a layer of experts.
        """
        if not self._beside:
            down, b = (array[1:].reshape(-1, array.shape[-1]) for array in (self.down, self.b))
            self._beside.append((down.T, b))
        return self._beside[0]

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated."""
        return [array for array in (self.packed, self.down, self.b, self.magnitude) if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return sum(array.nbytes for array in (self.down, self.b, self.magnitude) if array is not None)

    def slot(self, index: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """`a`, `b` and `magnitude` of one slot. They are views, and cut once."""
        if index not in self._slices:
            factor = None if self.magnitude is None else self.magnitude[index]
            self._slices[index] = self.down[index].swapaxes(-1, -2), self.b[index], factor
        return self._slices[index]

    def appended(self, change: Change) -> Stack:
        """With one more slot; the smaller rank is padded with zeros."""
        down = change.a.swapaxes(-1, -2)
        rank = max(self.down.shape[-2], down.shape[-2])
        return Stack.of(
            mx.concatenate([_padded(self.down, rank), _padded(down, rank)[None]]),
            mx.concatenate([_padded(self.b, rank), _padded(change.b, rank)[None]]),
            self._magnitude_with(change.factor),
            (*self.spans, change.spans),
        )

    def appended_nothing(self) -> Stack:
        """With one more slot that changes nothing."""
        zeros = mx.zeros_like(self.down[0]).swapaxes(-1, -2), mx.zeros_like(self.b[0])
        return self.appended(Change(*zeros, None, _no_spans(self.spans[0])))

    def without(self, slot: int, rank: int) -> Stack:
        """One slot less, and no rank above `rank`."""

        def cut(array: mx.array) -> mx.array:
            return mx.concatenate([array[:slot], array[slot + 1 :]])

        magnitude = None if self.magnitude is None else cut(self.magnitude)
        spans = self.spans[:slot] + self.spans[slot + 1 :]
        # Products would copy what is not contiguous in each call.
        down, b = (mx.contiguous(cut(array)[..., :rank, :]) for array in (self.down, self.b))
        return Stack.of(down, b, magnitude, spans)

    def _magnitude_with(self, factor: mx.array | None) -> mx.array | None:
        if factor is None and self.magnitude is None:
            return None
        slots, outputs = self.b.shape[0], self.b.shape[-1]
        before = mx.ones((slots, outputs), self.b.dtype) if self.magnitude is None else self.magnitude
        new = mx.ones((outputs,), self.b.dtype) if factor is None else factor
        return mx.concatenate([before, new[None]])


def _no_spans(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    return tuple((end, 0, 0) for end, _, _ in spans)


def _padded(array: mx.array, rank: int) -> mx.array:
    """With zeros on its last axis but one, up to `rank`."""
    missing = rank - array.shape[-2]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[-2] = (0, missing)
    return mx.pad(array, widths)
