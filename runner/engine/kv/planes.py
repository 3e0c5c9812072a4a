"""The arrays of one layer: [slots, heads, capacity, width], several of them side by side.

MLX arrays are values, but an operation whose input nobody else holds writes into it. So a write costs what is written,
as long as the arrays are reached through here alone. Launches of `attention_kernel` and `copy_kernel` write without MLX
knowing of it: whoever else gets at the arrays has those of the former dispatched first (`land`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv.positions import Positions

Slots = int | mx.array
"""One slot, or several: [N]."""


Form = list[tuple[int, int, mx.Dtype]]
"""Heads, width and type of a layer's arrays; empty while that is not known."""


class Planes:
    """Keys and values of the rows of one layer, or what they are encoded as."""

    def __init__(self, form: Form | None = None) -> None:
        """`form` is shared by all that there are of a layer: the first to be written to says what it is."""
        self._form = [] if form is None else form
        self._arrays: list[mx.array] = []
        self._launched: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """They, with all that was written to them. Not for a look at their shape alone."""
        self.land()
        return self._arrays

    @arrays.setter
    def arrays(self, arrays: list[mx.array]) -> None:
        self._arrays = arrays

    @property
    def results(self) -> list[mx.array]:
        """What is there once all that was written is: the arrays, and the output of the last launch."""
        return self._arrays if self._launched is None else [*self._arrays, self._launched]

    @property
    def capacity(self) -> int:
        """Tokens a slot has room for."""
        return self._arrays[0].shape[2] if self._arrays else 0

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written, or room made."""
        return not self._arrays

    @property
    def known(self) -> bool:
        """Whether room can be made before there is something to write."""
        return bool(self._arrays or self._form)

    def land(self) -> None:
        """Have the last launch dispatched: what is dispatched from now on finds what it writes."""
        if self._launched is not None:
            start(self._launched)
            self._launched = None

    def dispatched(self) -> None:
        """The last launch has been dispatched, by whoever started what depends on it."""
        self._launched = None

    def hold(self, arrays: Sequence[mx.array]) -> None:
        """Be what the `results` of a graph are that writes by launches alone."""
        count = len(self._arrays)
        self._arrays = list(arrays[:count])
        self._launched = arrays[count] if len(arrays) > count else None

    @property
    def types(self) -> list[mx.Dtype]:
        """Of the arrays: MLX's writes convert what is new, a launch does not."""
        return [array.dtype for array in self._arrays]

    def launch(self, run: Callable[[list[mx.array], mx.array | None], tuple[mx.array, Sequence[mx.array]]]) -> mx.array:
        """Write to them and attend to them, in one launch: `run` gets them and the output of the launch before, and
        returns what was attended to and what they are then."""
        self._launched, planes = run(self._arrays, self._launched)
        self._arrays = list(planes)
        return self._launched

    def reserve(self, slots: int, capacity: int, like: Sequence[mx.array]) -> None:
        """Have at least that much room, for arrays [rows, heads, tokens, width] `like` these, or of the known form."""
        if not self._arrays:
            if like:
                self._form[:] = _form(like)
            self._arrays = [
                mx.zeros((slots, heads, capacity, width), dtype=dtype) for heads, width, dtype in self._form
            ]
            return
        have, places = self._arrays[0].shape[0], self.capacity
        if have < slots or places < capacity:
            # All is copied: what is not asked for any more need not be.
            room = [(0, max(0, slots - have)), (0, 0), (0, max(0, capacity - places)), (0, 0)]
            self.arrays = [mx.pad(array[:slots, :, :capacity], room) for array in self.arrays]

    def begin(self, arrays: list[mx.array]) -> None:
        """Be these, which say what form there is; nothing was there before."""
        assert self.empty
        self._form[:] = _form(arrays)
        self._arrays = arrays

    def drop(self) -> None:
        """Have nothing any more: nobody will look at what was written."""
        self._arrays, self._launched = [], None

    def shrink(self, slots: int, capacity: int) -> None:
        """Let go of room beyond that much."""
        if self._arrays and (self._arrays[0].shape[0] > slots or self.capacity > capacity):
            self.arrays = [mx.contiguous(array[:slots, :, :capacity]) for array in self.arrays]

    def write(
        self, positions: Positions, new: Sequence[mx.array], size: int | None = None, last: int | None = None
    ) -> None:
        """Put `new` [rows, heads, count, width] after each row's tokens; at their positions modulo `size`.

        What would come behind place `last` is lost, and so is what is there.
        """
        same, rows, count = positions.same, positions.rows, positions.count
        if same is not None and (last is None or same + count <= last + 1):
            start = same if size is None else same % size
            if size is None or start + count <= size:
                for array, part in zip(self.arrays, new, strict=True):
                    array[:rows, :, start : start + count] = part
                return
        self.arrays = [
            _scattered(array, part, self._places(positions, array.shape, size, last))
            for array, part in zip(self.arrays, new, strict=True)
        ]

    def _places(self, positions: Positions, shape: tuple[int, ...], size: int | None, last: int | None) -> mx.array:
        """[rows · heads · count, width]: which line of an array of that shape, seen as [·, width], is written."""

        def lines() -> mx.array:
            _, heads, capacity, _ = shape
            at = positions.starts[:, None, None] + mx.arange(positions.count)
            if size is not None:
                at = mx.remainder(at, size)
            if last is not None:
                at = mx.minimum(at, last)
            kind = mx.int64 if shape[0] * heads * capacity > 1 << 31 else mx.int32
            first = mx.arange(0, positions.rows * heads * capacity, capacity, dtype=kind)
            return (first.reshape(positions.rows, heads, 1) + at).reshape(-1, 1)

        line = positions.once(("lines", shape[:3], size, last), lines)
        wide = (line.shape[0], shape[3])
        return positions.once(("lines", shape, size, last), lambda: mx.broadcast_to(line, wide))

    def view(self, rows: int, tokens: int) -> list[mx.array]:
        """The first `tokens` places of the first `rows` slots."""
        slots, _, capacity, _ = self._arrays[0].shape
        if (slots, capacity) == (rows, tokens):
            return self.arrays
        return [array[:rows, :, :tokens] for array in self.arrays]

    def lift(self, slots: Slots) -> list[mx.array]:
        """Copies of whole slots, not computed yet."""
        if isinstance(slots, int):
            return [mx.contiguous(array[slots : slots + 1]) for array in self.arrays]
        return [array[slots] for array in self.arrays]

    def put(self, slots: Slots, lifted: Sequence[mx.array]) -> None:
        """Write whole slots. What was lifted has to be started before: until then it keeps these from being written in
        place."""
        for array, part in zip(self.arrays, lifted, strict=True):
            if isinstance(slots, int):
                array[slots : slots + 1] = part
            else:
                array[slots] = part

    def paste(self, first: int, rows: int, other: Sequence[mx.array], start: int = 0) -> None:
        """Put arrays [≥ rows, heads, tokens, width] into `rows` slots from `first` on, at places from `start` on.

        Those of one row are put into every slot.
        """
        for array, part in zip(self.arrays, other, strict=True):
            array[first : first + rows, :, start : start + part.shape[2]] = part[:rows]

    def clear(self, first: int, rows: int, tokens: int) -> None:
        """Make zeros of what lies behind `tokens` tokens in `rows` slots from `first` on.

        What earlier rows have left there might be no numbers, and those spread from where they are masked.
        """
        if tokens < self.capacity:
            for array in self.arrays:
                array[first : first + rows, :, tokens:] = 0


def _form(arrays: Sequence[mx.array]) -> Form:
    return [(array.shape[1], array.shape[3], array.dtype) for array in arrays]


def _scattered(array: mx.array, new: mx.array, places: mx.array) -> mx.array:
    width = array.shape[3]
    if not width:
        return array
    lines = mx.put_along_axis(array.reshape(-1, width), places, new.reshape(-1, width), axis=0)
    return lines.reshape(array.shape)
