"""KV caches of prompts and finished rows, for prompts that begin the same.

Kept in a radix tree of tokens for each adapter key (another adapter, or another version of it, computes other values).
What several rows begin with is there once, and a conversation's next turn adds what is new. A row may begin anywhere
within what is kept, unless a layer has more than pieces can say (a window that has wrapped, a recurrent state): then
only where a state was kept, which is at the ends of prompts and of answers.

What goes first, when the limit of bytes is reached, is what is cheapest to compute again for the room it takes, of
what has been used least and longest ago: GreedyDual-Size with Frequency (Cherkasova, HP Labs 1998). A node's priority
is the clock, when it was last used, and its uses times its cost a byte; the clock is the priority of what went last.
The cost of a token grows with its position, since it attends to what is before it. Only ends can go, so long rows
shrink from their ends, and beginnings that many share stay.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning, Piece
from runner.engine.radix import TOKEN, Node, pack, root, walk

_MOST: Final = 1024
"""Tokens of a node, at most: what is given up at a time. A row that is taken up again copies each node apart."""

_LINEAR: Final = 16384
"""The position from which on a token costs twice of what the first does: where attending to what is before it takes as
long as the products with the weights. So it is for a model of the geometry of Llama-3.2-1B."""


class PrefixCache:
    """Maps (adapter key, tokens) to what is kept of them."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes; 0 keeps nothing."""
        self.nbytes = 0
        self._limit = limit
        self._trees: dict[str, Node] = {}
        self._clock = 0.0
        self._stamps = 0
        self._nodes = 0
        # (priority, stamp, node), some of them outdated: those whose stamp is not their node's.
        self._first: list[tuple[float, int, Node]] = []

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._limit > 0

    def resize(self, limit: int) -> None:
        """Change the limit, in bytes, now."""
        self._limit = limit
        self._shrink()

    def look_up(self, adapter: str, prompt: Sequence[int]) -> Beginning | None:
        """The longest known beginning of `prompt`; its last token is never part of it."""
        tree = self._trees.get(adapter)
        if tree is None or len(prompt) < 2:
            return None
        best, pieces, anywhere = None, [], True
        for node, matching in walk(tree, pack(prompt[:-1])):
            pieces.append(node.piece)
            anywhere = anywhere and node.piece.complete
            if anywhere:
                best = Beginning(node.piece.start + matching, tuple(pieces))
            elif node.state is not None and node.piece.start + matching == node.piece.stop:
                best = Beginning(node.piece.stop, tuple(pieces), node.state)
        return best

    def use(self, adapter: str, tokens: Sequence[int]) -> None:
        """Count a use of the beginning `tokens`."""
        if (tree := self._trees.get(adapter)) is not None:
            for node, _ in walk(tree, pack(tokens)):
                node.hits += 1
                self._rank(node)

    def store(self, adapter: str, tokens: Sequence[int], caches: Caches, row: int) -> None:
        """Keep what `caches` have of a row that begins with `tokens`; of what follows on them nothing is known."""
        self.store_each([(adapter, tokens, caches, row)])

    def store_each(self, rows: Iterable[tuple[str, Sequence[int], Caches, int]]) -> None:
        """`store` with each of these: copies of all are started together, since each start costs the host."""
        copied: list[mx.array] = []
        try:
            for adapter, tokens, caches, row in rows:
                self._store(adapter, tokens, caches, row, copied)
        finally:
            # Not evaluated, they would hold on to the whole batch.
            start(copied)

    def _store(self, adapter: str, tokens: Sequence[int], caches: Caches, row: int, copied: list[mx.array]) -> None:
        tokens = tokens[: caches.length(row)]
        if not self.enabled or not tokens:
            return
        tree = self._trees.setdefault(adapter, root())
        path = walk(tree, packed := pack(tokens))
        known = path[-1][0].piece.start + path[-1][1] if path else 0
        state = caches.state(row) if len(tokens) == caches.length(row) else None
        grown = _grown(path, len(tokens), caches, row)
        spans = _spans(known, len(tokens), caches.seam) if grown is None else ()
        pieces = [caches.piece(row, start, stop) for start, stop in spans]
        nbytes = sum(piece.nbytes for piece in pieces) + (0 if state is None else state.nbytes)
        nbytes += 0 if grown is None else grown.nbytes - path[-1][0].piece.nbytes
        if nbytes + len(packed) > self._limit:
            return
        node = self._end(tree, path, copied, apart=bool(pieces) or state is not None)
        if grown is not None:
            self._grow(node, packed, grown, copied)
        for piece in pieces:
            node = self._append(node, packed, piece, copied)
        if state is not None and node.state is None:
            node.state = state
            self.nbytes += state.nbytes
            copied += state.arrays
        self._rank(node)
        self._shrink()

    def evict(self, adapter: str) -> None:
        """Forget everything of an adapter."""
        tree = self._trees.pop(adapter, None)
        for node in () if tree is None else tree.below():
            self._forget(node)

    def release(self, nbytes: int) -> int:
        """Give up what goes first until at least `nbytes` bytes are free, or nothing is left; returns how many were."""
        before = self.nbytes
        while self.nbytes and before - self.nbytes < nbytes:
            self._give_up()
        return before - self.nbytes

    # ------------------------------------------------------------- growing

    def _end(self, tree: Node, path: list[tuple[Node, int]], copied: list[mx.array], *, apart: bool) -> Node:
        """The node at the end of `path`; `apart` if one has to end just there, by copies that are to be started."""
        if not path:
            return tree
        node, matching = path[-1]
        if not apart or node.piece.start + matching == node.piece.stop:
            return node
        before = node.nbytes
        upper = node.split(matching)
        copied += upper.piece.arrays + node.piece.arrays
        self.nbytes += upper.nbytes + node.nbytes - before
        self._nodes += 1
        self._rank(upper)
        self._rank(node)
        return upper

    def _grow(self, node: Node, packed: bytes, piece: Piece, copied: list[mx.array]) -> None:
        """Have `piece` in the place of what a node has, which it begins with."""
        before = node.nbytes
        node.piece, node.tokens = piece, packed[TOKEN * piece.start : TOKEN * piece.stop]
        self.nbytes += node.nbytes - before
        copied += piece.arrays
        self._rank(node)

    def _append(self, node: Node, packed: bytes, piece: Piece, copied: list[mx.array]) -> Node:
        """The node of a piece that follows on `node`."""
        node = Node(node, packed[TOKEN * piece.start : TOKEN * piece.stop], piece)
        self.nbytes += node.nbytes
        self._nodes += 1
        copied += piece.arrays
        self._rank(node)
        return node

    # ------------------------------------------------------------- shrinking

    def _rank(self, node: Node) -> None:
        """Reckon a node's priority anew, as of now."""
        tokens = node.piece.stop - node.piece.start
        cost = tokens * (1 + (node.piece.start + node.piece.stop) / 2 / _LINEAR)
        node.priority = self._clock + node.hits * cost / max(1, node.nbytes)
        self._queue(node)

    def _queue(self, node: Node) -> None:
        self._stamps += 1
        node.stamp = self._stamps
        heapq.heappush(self._first, (node.priority, node.stamp, node))
        if len(self._first) > 64 + 4 * self._nodes:
            self._first = [entry for entry in self._first if entry[1] == entry[2].stamp]
            heapq.heapify(self._first)

    def _shrink(self) -> None:
        while self.nbytes > self._limit:
            self._give_up()

    def _give_up(self) -> None:
        """The end that goes first, or the state that does, if it is within."""
        priority, stamp, node = heapq.heappop(self._first)
        if stamp != node.stamp:
            return
        if node.children:
            if node.state is not None:
                self._clock = priority
                self.nbytes -= node.state.nbytes
                node.state = None
            return
        self._clock = priority
        above: Node | None = node
        # What led only to it goes with it, if nothing can begin there.
        while above is not None and above.parent is not None and not above.children:
            node, above = above, above.parent
            node.remove()
            self._forget(node)
            if above.piece.complete or above.state is not None:
                break
        if above is not None and above.parent is not None and not above.children:
            self._queue(above)

    def _forget(self, node: Node) -> None:
        if node.parent is not None:
            self.nbytes -= node.nbytes
            self._nodes -= 1
            node.stamp = 0


def _spans(start: int, stop: int, seam: int | None) -> Iterator[tuple[int, int]]:
    """What positions `start` to `stop` - 1 are cut into: none too long, none across the seam."""
    while start < stop:
        end = min(start + _MOST, stop)
        if seam is not None and start < seam < end:
            end = seam
        yield start, end
        start = end


def _grown(path: list[tuple[Node, int]], length: int, caches: Caches, row: int) -> Piece | None:
    """What the node at the end of `path` is to have if it grows to the row's first `length` tokens; None if not.

    All of it is copied of the row: that is one copy of each, where joining what is new to what there was would be two.
    """
    node, matching = path[-1] if path else (None, 0)
    if node is None or node.children or node.state is not None:
        return None
    start, stop = node.piece.start, node.piece.stop
    if start + matching != stop or not stop < length or next(_spans(start, length, caches.seam)) != (start, length):
        return None
    piece = caches.piece(row, start, length)
    return piece if piece.complete == node.piece.complete else None
