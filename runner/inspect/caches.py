"""What a model keeps for each row of a batch: keys and values that grow with it, windows that do not, states.

Counted in values, not bytes: the type is that of the activations, and known later. Which architecture keeps what is in
`runner.inspect.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from runner.inspect.memory import whole_steps

_BEHIND: Final = 16
"""Tokens behind a threshold that rows have room for in what is not packed (`runner.engine.kv.thresholded`)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """`bits` a value, and two numbers of the activations' type for each `group_size` of them, in rows that come to
    position `start`; before it they are kept as they are computed, too."""

    bits: int
    group_size: int
    start: int = 0


def used(packing: Packing | None, tokens: int) -> Packing | None:
    """The packing that rows of so many tokens, 0 for any number, have room for: that is where they have room beyond its
    start."""
    return packing if packing is not None and (not tokens or whole_steps(tokens) > packing.start) else None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Values that one row keeps, over all layers.

    `growing` are values a token for as long as the row grows; `windows` maps a window in tokens to values a token;
    `state` are values that are there whatever the row's length, `state32` such that are float32 in any model.
    `head_dims` are the widths of the heads that grow, which a quantised KV cache has to divide. `known` is whether
    there is a rule for the architecture.
    """

    growing: int = 0
    windows: Mapping[int, int] = field(default_factory=dict)
    state: int = 0
    state32: int = 0
    head_dims: tuple[int, ...] = ()
    known: bool = True

    @property
    def trimmable(self) -> bool:
        """Whether a row can be cut back to any earlier length."""
        return not self.windows and not self.recurrent

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state instead of, or beside, keys and values."""
        return bool(self.state or self.state32)

    def __add__(self, other: CacheLayout) -> CacheLayout:
        windows = dict(self.windows)
        for size, values in other.windows.items():
            windows[size] = windows.get(size, 0) + values
        return CacheLayout(
            self.growing + other.growing,
            windows,
            self.state + other.state,
            self.state32 + other.state32,
            tuple(sorted({*self.head_dims, *other.head_dims})),
            self.known and other.known,
        )

    def __mul__(self, layers: int) -> CacheLayout:
        return replace(
            self,
            growing=self.growing * layers,
            windows={size: values * layers for size, values in self.windows.items()},
            state=self.state * layers,
            state32=self.state32 * layers,
        )

    def row_bytes(self, tokens: int, itemsize: int, packing: Packing | None = None) -> int:
        """Bytes of a row with so many tokens; `itemsize` is of the activations' type. What grows is packed so, if at
        all."""
        held = whole_steps(tokens)
        windows = sum(values * min(held, size) for size, values in self.windows.items())
        fixed = (windows + self.state) * itemsize + self.state32 * 4
        packing = used(packing, tokens)
        if packing is not None and packing.start:
            fixed += self.token_bytes(itemsize) * min(held, packing.start + _BEHIND)
        return self.token_bytes(itemsize, packing) * held + fixed

    def token_bytes(self, itemsize: int, packing: Packing | None = None) -> int:
        """Bytes that a token adds while no window is full."""
        if packing is None:
            return self.growing * itemsize
        return self.growing * packing.bits // 8 + self.growing // packing.group_size * 2 * itemsize


NOTHING: Final = CacheLayout()


def attention(heads: int, key_dim: int, value_dim: int | None = None) -> CacheLayout:
    """A layer that keeps the keys and values of every token."""
    value_dim = key_dim if value_dim is None else value_dim
    return CacheLayout(growing=heads * (key_dim + value_dim), head_dims=tuple(sorted({key_dim, value_dim})))


def window(size: int, heads: int, key_dim: int, value_dim: int | None = None) -> CacheLayout:
    """A layer that keeps those of the last `size` tokens."""
    value_dim = key_dim if value_dim is None else value_dim
    return CacheLayout(windows={size: heads * (key_dim + value_dim)})


def state(values: int = 0, *, float32: int = 0) -> CacheLayout:
    """A layer that keeps so many values, in the type of the activations and in float32."""
    return CacheLayout(state=values, state32=float32)
