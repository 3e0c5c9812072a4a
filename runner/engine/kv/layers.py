"""What upstream's models find in the place of their caches: one object a layer.

They ask it for `offset`, `make_mask` and `update_and_fetch` (mlx_lm.models.base and cache are the reference), or, if
the layer is a recurrent one, for the arrays of its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from runner.engine.kv import attention_kernel, masks, prompt_kernel
from runner.engine.kv.calls import Call, JoinedCall, Launch
from runner.engine.kv.kept import Cut, Place
from runner.engine.kv.masks import FEW
from runner.engine.kv.moves import Beginnings, Moves, Whole
from runner.engine.kv.planes import Form, Planes, Slots
from runner.engine.kv.positions import Positions
from runner.engine.kv.rotary import Deferred, Rotation, Unrotated, rotated, rotation_of, together
from runner.engine.kv.unwritten import Unwritten

JoinedRun = Callable[[mx.array, Sequence[mx.array], mx.array, mx.array | None], tuple[mx.array, Sequence[mx.array]]]
"""From a joined product, a layer's planes, the rows' starts and what the launch waits for, as a launch returns it."""


class Straight:
    """Keys and values of all tokens. [slots, heads, capacity, width]

    With a `launch`, a call of a few tokens a row writes and attends in one operation, where it can; with a
    `prompt_launch`, a wider one in two.
    """

    _window: int | None = None
    _ring: int | None = None

    def __init__(
        self,
        positions: Positions,
        launch: Launch | None = None,
        prompt_launch: Launch | None = None,
        form: Form | None = None,
        *,
        rotates: bool = False,
    ) -> None:
        """With `rotates`, launches also rotate what a model leaves to them. `form` is the layer's (see Planes)."""
        self._rotates = rotates
        self._positions = positions
        self._planes = Planes(form)
        self._launch = launch
        self._prompt_launch = prompt_launch
        self._unwritten: Unwritten | None = None
        self._attended = False

    @property
    def offset(self) -> Any:
        offset = self._positions.offset
        return Deferred(offset) if self._rotates and self._launches else offset

    @property
    def keys(self) -> mx.array:
        """Some models tie other computations to it."""
        self.end()
        return self._planes.arrays[0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._planes.arrays[0] = keys

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> masks.Mask:
        made = lambda: masks.straight(self._positions, window_size, return_array)  # noqa: E731
        mask = self._positions.once(("straight", window_size, return_array), made)
        return self._given(mask, window_size)

    def update_and_fetch(self, keys: Any, values: mx.array) -> Any:
        lines = keys.lines if isinstance(keys, Unrotated) else keys
        self._planes.reserve(self._positions.slots, self._room(), (lines, values))
        if self._launches:
            self._unwritten = Unwritten(self, keys, values)
            return self._unwritten, self._unwritten
        self.write(keys, values)
        return self.keys_and_values()

    def write(self, keys: Any, values: mx.array) -> None:
        """Put a call's keys and values [rows, heads, count, width] after each row's tokens, for which there is room."""
        self._planes.write(self._positions, (rotated(keys), values), self._ring)

    def attend(self, queries: Any, keys: Any, values: mx.array, scale: float, mask: masks.Mask) -> mx.array | None:
        """`write`, and what `queries` [rows, heads, count, width] see, by launches alone; None if that cannot be.

        Then nothing is done.
        """
        seen = self._seen(mask)
        launch, kernel = self._launch, attention_kernel.applies
        if self._positions.count > FEW:
            launch, kernel = self._prompt_launch, prompt_kernel.applies
        if launch is None or seen is None:
            return None
        (window,) = seen
        if self._window is not None and not (window and window <= self._window):
            return None  # a ring does not hold what such a mask may show
        queries, keys, rotation = together(queries, keys)
        if not (self._planes.types == [keys.dtype, values.dtype] and kernel(queries, keys, values)):
            return None
        self._attended = True
        starts = self._starts()
        ring = self._ring

        def run(planes: list[mx.array], after: mx.array | None) -> tuple[mx.array, Sequence[mx.array]]:
            held = planes[0], planes[1]
            return launch(Call(queries, keys, values, held, starts, scale, window, ring, after, rotation))

        return self._planes.launch(run)

    def joined(
        self, form: tuple[int, int, int], dtype: mx.Dtype, rope: Any, scale: float, mask: masks.Mask
    ) -> Callable[[mx.array], mx.array] | None:
        """What writes and attends in one launch, where queries, keys and values are side by side in one array; `form`
        says how many heads and key heads there are, and how wide. None if that cannot be.

        It takes [rows, count, (heads + 2 · groups) · width], and returns [rows, count, heads · width].
        """
        rotation, positions, planes = rotation_of(rope), self._positions, self._planes
        if rotation is None or not self._rotates or self._ring is not None or not planes.known:
            return None
        if self._seen(mask) != (None,) or (run := self._joined(form, dtype, scale, rotation)) is None:
            return None
        planes.reserve(positions.slots, self._room(), ())
        if not self._holds(dtype):
            return None
        self._attended = True
        starts = self._starts()
        return lambda joined: planes.launch(lambda held, after: run(joined, held, starts, after))

    def _joined(
        self, form: tuple[int, int, int], dtype: mx.Dtype, scale: float, rotation: Rotation
    ) -> JoinedRun | None:
        """What does that with the planes, if there is a launch for it."""
        launch = attention_kernel.joined_launch(self._launch)
        if launch is None or not attention_kernel.applies_joined(dtype, self._positions.count, *form):
            return None
        return lambda joined, held, starts, after: launch(
            JoinedCall(joined, *form, (held[0], held[1]), starts, scale, after, rotation)
        )

    def _holds(self, dtype: mx.Dtype) -> bool:
        """Whether keys and values of a type are held as such."""
        return self._planes.types == [dtype, dtype]

    def added(self, mask: mx.array, shape: tuple[int, int, int, int] | None = None) -> mx.array | None:
        """`masks.added` of a mask that a cache has made for the call under way, or `masks.numbers` where there is no
        shape, made once for all layers; else None."""
        positions = self._positions
        if not any(known is mask for known, _ in _given_masks(positions)):
            return None
        made = lambda: masks.numbers(mask) if shape is None else masks.added(mask, shape)  # noqa: E731
        return positions.once(("added", id(mask), shape), made)

    def _given(self, mask: masks.Mask, window: int | None) -> masks.Mask:
        """A mask that a model gets, of which is remembered during the call what it means."""
        if isinstance(mask, mx.array):
            _given_masks(self._positions).append((mask, window))
        return mask

    def _seen(self, mask: masks.Mask) -> tuple[int | None] | None:
        """The window that a mask which the model hands to its attention stands for, None for a mask of its own."""
        if isinstance(mask, mx.array):
            return next(((window,) for known, window in _given_masks(self._positions) if known is mask), None)
        own = self.make_mask(self._positions.count)
        return (self._window,) if not isinstance(own, mx.array) and mask == own else None

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """[rows, heads, tokens, width], the call's own included."""
        keys, values = self._planes.view(self._positions.rows, self._positions.reach)
        return keys, values

    @property
    def arrays(self) -> list[mx.array]:
        return self._planes.results

    def begin(self) -> None:
        self._unwritten = None
        self._attended = False

    @property
    def idle(self) -> bool:
        return False

    def dispatched(self) -> None:
        self._planes.dispatched()

    def traceable(self) -> bool:
        if not self._launches or not self._planes.known:
            return False
        self._planes.reserve(self._positions.slots, self._room(), ())
        return True

    @property
    def traced(self) -> bool:
        return self._attended

    def hold(self, arrays: Sequence[mx.array]) -> None:
        self._planes.hold(arrays)

    def end(self) -> None:
        if self._unwritten is not None:
            self._unwritten.settle()
            self._unwritten = None

    def extend(self, first: int, other: Straight, moves: Moves) -> None:
        new = other._planes.arrays
        if new or not self._planes.empty:
            self._planes.reserve(self._positions.slots, self._room(), new)
            if new and self._in_place and moves.take(new, self._planes.arrays):
                return
            if new:
                self._planes.paste(first, other._positions.rows, new)
            self._planes.clear(first, other._positions.rows, new[0].shape[2] if new else 0)

    @property
    def _in_place(self) -> bool:
        """Whether there are launches that write to the planes, and everybody knows."""
        return self._launch is not None

    @property
    def _launches(self) -> bool:
        """Whether the call may be launches."""
        if self._positions.count <= FEW:
            return self._launch is not None
        # Those for prompts take a position for its place.
        return self._prompt_launch is not None and (self._ring is None or self._positions.reach <= self._ring)

    def _starts(self) -> mx.array:
        """[rows] int32: where a launch has a call's first tokens."""
        return self._positions.once("row starts", lambda: self._positions.row_starts)

    def _room(self) -> int:
        return self._positions.capacity

    def lift(self, slots: Slots, moves: Moves) -> list[mx.array]:
        planes = self._planes.arrays
        return [] if self._in_place and moves.take(planes, planes) else self._planes.lift(slots)

    def take(self, order: list[int], holes: Slots, lifted: list[mx.array]) -> None:
        if lifted:
            self._planes.put(holes, lifted)
        self.fit()

    def fit(self) -> None:
        self._planes.shrink(self._positions.slots, self._room())

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        return cut.take(self._planes.arrays)

    def state(self, row: int, written: int) -> list[mx.array] | None:
        return None

    def put_piece(self, begun: Beginnings, places: Sequence[Place]) -> None:
        self._planes.reserve(self._positions.slots, self._room(), begun.like(places))
        if not (self._in_place and begun.take(places, self._planes.arrays)):
            self._planes.paste(begun.row, begun.rows, begun.arrays(places), begun.start_at)

    def put_state(self, row: int, arrays: Sequence[mx.array]) -> None:
        raise AssertionError("its pieces say all")

    @property
    def begins_whole(self) -> bool:
        return self._in_place and self._ring is None and self._planes.empty

    def begin_whole(self, whole: Whole, places: Sequence[Place]) -> None:
        self._planes.begin(whole.planes(places))


def _given_masks(positions: Positions) -> list[tuple[mx.array, int | None]]:
    """Masks that caches have made in this call, with their windows."""
    given: list[tuple[mx.array, int | None]] = positions.once("given masks", list)
    return given
