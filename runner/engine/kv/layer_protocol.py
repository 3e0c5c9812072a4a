"""What the room asks of a layer's cache, whatever it holds (`layers.py`, `window.py`, `recurrent.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from runner.engine.kv.kept import Cut, Place
from runner.engine.kv.moves import Beginnings, Moves, Whole
from runner.engine.kv.planes import Slots


class Layer(Protocol):
    """What a layer's cache is to the room."""

    @property
    def arrays(self) -> list[mx.array]:
        """All that it holds on the device, and what has to be evaluated for it to be complete."""
        ...

    def begin(self) -> None:
        """A model call starts; the positions say which."""
        ...

    def end(self) -> None:
        """The call is built; the positions do not know yet."""
        ...

    @property
    def idle(self) -> bool:
        """Whether the call that has begun neither writes to it nor reads it."""
        ...

    def dispatched(self) -> None:
        """All that was built has been dispatched."""
        ...

    def traceable(self) -> bool:
        """Whether the call that has begun can be a graph that is used again: room is made for it here.

        Such a graph takes and returns `arrays`.
        """
        ...

    @property
    def traced(self) -> bool:
        """Whether what was built of the call would do for another one, with other arrays."""
        ...

    def hold(self, arrays: Sequence[mx.array]) -> None:
        """Have what a graph takes or returns."""
        ...

    def extend(self, first: int, other: Any, moves: Moves) -> None:
        """Rows of `other` come after the `first` ones here, now or by `moves`. `other` is not used any more."""
        ...

    def lift(self, slots: Slots, moves: Moves) -> list[mx.array]:
        """Copies of slots, not computed yet, for `take` to put into others; none where `moves` does that."""
        ...

    def take(self, order: list[int], holes: Slots, lifted: list[mx.array]) -> None:
        """Rows `order` stay, as it lists them: what was `lifted` goes to the slots `holes`, nothing if it is empty."""
        ...

    def fit(self) -> None:
        """Let go of room that is not asked for any more."""
        ...

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        """Have a row's positions copied; None if they cannot be had apart. It had up to `written` tokens."""
        ...

    def state(self, row: int, written: int) -> list[mx.array] | None:
        """A copy of what a row has that had up to `written` tokens; None if pieces say as much."""
        ...

    def put_piece(self, begun: Beginnings, places: Sequence[Place]) -> None:
        """Have what `piece` had copied to these places, now or when `begun` puts it."""
        ...

    def put_state(self, row: int, arrays: Sequence[mx.array]) -> None:
        """Have what `state` returned, in a row that nothing was written to yet."""
        ...

    @property
    def begins_whole(self) -> bool:
        """Whether it can begin with planes that launches have made: nothing was there yet, and it has launches."""
        ...

    def begin_whole(self, whole: Whole, places: Sequence[Place]) -> None:
        """Begin with what `piece` had copied to these places, and the room that there is to be."""
        ...
