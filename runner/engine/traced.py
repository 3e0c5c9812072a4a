"""Model calls whose graphs are built once and used again.

On a GPU a step of a batch is bound by the host, and a third of its time went by in building the same graph each time:
upstream's models are Python. What a call depends on is the values of arrays (tokens, the rows' starts, the caches) as
long as the rows, the room in the caches and the adapters stay what they are, so `mx.compile` may keep the graph for
each such shape. Only where writing and attending is left to launches: in separate operations a mask and the keys grow
with each token. How many of a row's tokens are padding is no matter to what is computed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import mlx.core as mx

from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.layers import RowSlots
from runner.engine.arrays import compiled
from runner.engine.kv.caches import Caches, Held, Traced

logger = logging.getLogger(__name__)

_BUILT_BEFORE: Final = 2
"""Calls of a shape that are built anew before a graph is kept: keeping one takes as long as building a few."""

_MOST: Final = 64
"""Graphs that are kept; a megabyte each for a model of some tens of layers."""

_MOST_COUNTED: Final = 1024

_Kept = Callable[[mx.array, mx.array, list[mx.array], Held], Traced]


class TracedCalls:
    """A model's calls, with the graphs of the shapes that were seen last."""

    def __init__(self, model: Any, bank: AdapterBank | None = None) -> None:
        """`bank` is the model's, if it may have adapters."""
        self._model = model
        self._bank = bank
        self._graphs: OrderedDict[Hashable, _Kept | None] = OrderedDict()
        self._counts: OrderedDict[Hashable, int] = OrderedDict()
        self._generation = 0
        self._caches: Caches | None = None
        self._only: int | None = None
        self._building = False
        self.building = 0.0
        """Seconds spent so far in calls whose graph was built, where later ones of their shape find it kept."""

    def __call__(
        self, caches: Caches, tokens: mx.array, slots: RowSlots | None = None, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """As `caches.call(model, tokens, lengths)` with the adapters of `slots` applied."""
        began, self._building = time.perf_counter(), False
        answer = self._answer(caches, tokens, slots, lengths)
        if self._building:
            self.building += time.perf_counter() - began
        return answer

    def _answer(
        self, caches: Caches, tokens: mx.array, slots: RowSlots | None, lengths: Sequence[int] | None
    ) -> mx.array:
        self._apply(slots)
        only = None if slots is None else slots.only
        key = (caches.shape(tokens.shape[1], lengths), slots is None, only)
        kept = None if key[0] is None else self._kept(key)
        if kept is None:
            return caches.call(self._model, tokens, lengths)
        self._caches, self._only = caches, only
        rows = [] if slots is None else slots.arrays
        try:
            return caches.call_graph(lambda tokens, starts, held: kept(tokens, starts, rows, held), tokens)
        except Exception as error:  # noqa: BLE001 - whatever a model's code trips over when its arrays are not known
            logger.warning("a step's graph is built each time: %r", error)
            self._graphs[key] = None
        finally:
            self._caches = None
            self._apply(slots)
        return caches.call(self._model, tokens, lengths)

    def _apply(self, slots: RowSlots | None) -> None:
        if self._bank is not None:
            self._bank.apply(slots)

    def _kept(self, key: Hashable) -> _Kept | None:
        """The graph for a shape, to be traced by its first call; None where there is to be none (yet)."""
        if self._bank is not None and self._generation != self._bank.generation:
            # Graphs hold on to the adapters that they were traced with.
            self._generation = self._bank.generation
            self._graphs.clear()
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._building = True
        seen = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _MOST_COUNTED:
            self._counts.popitem(last=False)
        if seen <= _BUILT_BEFORE:
            return None
        graph: _Kept = compiled(self._trace)
        self._graphs[key] = graph
        if len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)
        return graph

    def _trace(self, tokens: mx.array, starts: mx.array, slots: list[mx.array], held: Held) -> Traced:
        """The call itself; runs when a graph is built, with arrays that stand for those of later calls."""
        assert self._caches is not None
        self._building = True
        self._apply(RowSlots.of_arrays(slots, self._only) if slots else None)
        return self._caches.trace(self._model, tokens, starts, held)
