"""Caches of classes that are not understood here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning, Piece, State
from runner.engine.kv.positions import Positions


class Foreign(Caches):
    """One row in upstream's own caches."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(Positions(1), [])
        self.layers = layers

    @property
    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in _flat(layer.state)]

    @property
    def by_layer(self) -> list[list[mx.array]]:
        return [self.arrays]

    def join(self, other: Caches, soon: int = 0) -> None:
        raise AssertionError("a row in these caches is alone")

    def piece(self, row: int, start: int, stop: int) -> Piece:
        # One layer without a part: nothing can be cut.
        return Piece(start, stop, [], (None,))

    def state(self, row: int) -> State | None:
        # Copying an array shares its memory until one side is written.
        kept = copy.deepcopy(self.layers)
        return State(self._positions.most[0], tuple(_flat(layer.state) for layer in kept), kept)

    def restore(self, beginnings: Sequence[Beginning | None], reserve: int, ends: Sequence[int] = ()) -> None:
        (begun,) = beginnings
        if begun is not None:
            assert begun.state is not None
            self._positions.restart([begun.length], [begun.length])
            self.layers = copy.deepcopy(begun.state.foreign or [])


def _flat(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    return [array for part in tree for array in _flat(part)] if isinstance(tree, (list, tuple)) else []
