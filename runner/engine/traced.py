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
from typing import Any, Final, TypeVar

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

Answer = TypeVar("Answer")


class KeptGraphs:
    """Graphs of the shapes that were seen last, by whatever tells shapes apart."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()
        self._counts: OrderedDict[Hashable, int] = OrderedDict()
        self._trace: Callable[..., Any] | None = None
        self._building = False
        self.building = 0.0
        """Seconds spent so far in calls whose graph was built, where later ones of their shape find it kept."""

    def clear(self) -> None:
        """Let go of all graphs."""
        self._graphs.clear()

    def run(
        self,
        key: Hashable | None,
        trace: Callable[..., Any],
        call: Callable[[Callable[..., Any]], Answer],
        build: Callable[[], Answer],
    ) -> Answer:
        """What `call` makes of the graph of `trace` for this shape, or else `build`; None is a shape that has none.

        `trace` gets the arguments that `call` has for the graph, or arrays that stand for them.
        """
        if key is None:
            return build()
        began, self._building = time.perf_counter(), False
        try:
            return self._run(key, trace, call, build)
        finally:
            if self._building:
                self.building += time.perf_counter() - began

    def _run(
        self,
        key: Hashable,
        trace: Callable[..., Any],
        call: Callable[[Callable[..., Any]], Answer],
        build: Callable[[], Answer],
    ) -> Answer:
        graph = self._kept(key)
        if graph is not None:
            self._trace = trace
            try:
                return call(graph)
            except Exception as error:  # noqa: BLE001 - whatever a model's code trips over when its arrays are not known
                logger.warning("a step's graph is built each time: %r", error)
                self._graphs[key] = None
            finally:
                self._trace = None
        return build()

    def _kept(self, key: Hashable) -> Callable[..., Any] | None:
        """The graph for a shape, to be traced by its first call; None where there is to be none (yet)."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._building = True
        seen = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _MOST_COUNTED:
            self._counts.popitem(last=False)
        if seen <= _BUILT_BEFORE:
            return None
        graph = self._graphs[key] = compiled(self._traced)
        if len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)
        return graph

    def _traced(self, *arguments: Any) -> Any:
        """Runs when a graph is built."""
        assert self._trace is not None
        self._building = True
        return self._trace(*arguments)


class TracedCalls:
    """A model's calls, with the graphs of the shapes that were seen last."""

    def __init__(self, model: Any, bank: AdapterBank | None = None) -> None:
        """`bank` is the model's, if it may have adapters."""
        self._model = model
        self._bank = bank
        self._graphs = KeptGraphs()
        self._generation = 0

    @property
    def building(self) -> float:
        """Seconds spent so far on building graphs that are kept."""
        return self._graphs.building

    def __call__(
        self,
        caches: Caches,
        tokens: mx.array,
        slots: RowSlots | None = None,
        lengths: Sequence[int] | None = None,
        padded: tuple[int, RowSlots | None] | None = None,
    ) -> mx.array:
        """As `caches.call(model, tokens, lengths)` with the adapters of `slots` applied.

        With `padded`, the graph is one of so many rows, which have such slots.
        """
        self._apply(slots)
        if self._bank is not None and self._generation != self._bank.generation:
            # Graphs hold on to the adapters that they were traced with.
            self._generation = self._bank.generation
            self._graphs.clear()
        only = None if slots is None or (self._bank is not None and self._bank.alike) else slots.only
        count, its_slots = padded or (caches.rows, slots)
        rows = [] if its_slots is None else its_slots.arrays
        shape = caches.shape(tokens.shape[1], lengths)

        def trace(tokens: mx.array, starts: mx.array, rows: list[mx.array], held: Held) -> Traced[mx.array]:
            self._apply(RowSlots.of_arrays(rows, only) if rows else None)
            return caches.trace(self._model, tokens, starts, held)

        def call(graph: Callable[..., Traced[mx.array]]) -> mx.array:
            try:
                answer = caches.call_graph(
                    lambda tokens, starts, held: graph(tokens, starts, rows, held), tokens, count
                )
                return answer if count == caches.rows else answer[: caches.rows]
            finally:
                self._apply(slots)

        key = None if shape is None else (*shape[1:], count, slots is None, only)
        return self._graphs.run(key, trace, call, lambda: caches.call(self._model, tokens, lengths))

    def _apply(self, slots: RowSlots | None) -> None:
        if self._bank is not None:
            self._bank.apply(slots)
