"""A layer's attention in a model call, as launches are given it, and what a launch for it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import msgspec

from runner.engine.kv.rotary import Rotation

Planes = tuple[mx.array, mx.array]
"""Keys and values of a layer, [slots, groups, places, width] each."""


class Call(msgspec.Struct, frozen=True, eq=False):
    """A layer's attention in a model call, and what is to be written before it.

    `queries` [rows, heads, tokens, width]; `keys` and `values` [rows, groups, tokens, width] are those of the same
    tokens, `planes` those of the tokens before, `starts` [rows] int32 says of how many. The place of a position is
    itself, or itself modulo `ring`. A token sees itself and what is before it, `window` tokens in all. `after` is what
    the layer's launch before has returned, while that may not be dispatched. Queries and keys are to be rotated first,
    if there is a `rotation`.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    planes: Planes
    starts: mx.array
    scale: float
    window: int | None
    ring: int | None
    after: mx.array | None
    rotation: Rotation | None = None


Launch = Callable[[Call], tuple[mx.array, Planes]]
"""What does a call: returns what is attended to, and the planes with the new keys and values."""


class JoinedCall(msgspec.Struct, frozen=True, eq=False):
    """The same for queries, keys and values side by side in `joined` [rows, tokens, (heads + 2 · groups) · width], as a
    product of all three has them; of layers that cache all tokens, without a window."""

    joined: mx.array
    heads: int
    groups: int
    width: int
    planes: Planes
    starts: mx.array
    scale: float
    after: mx.array | None
    rotation: Rotation


JoinedLaunch = Callable[[JoinedCall], tuple[mx.array, Planes]]
"""What does that: returns what is attended to, [rows, tokens, heads · width], and the planes."""


class Held(Protocol):
    """What is there before a call's new tokens, and what these wait for, in any format."""

    @property
    def planes(self) -> Sequence[mx.array]: ...
    @property
    def starts(self) -> mx.array: ...
    @property
    def after(self) -> mx.array | None: ...
    @property
    def rotation(self) -> Rotation | None: ...
