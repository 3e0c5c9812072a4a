"""A radix tree over tokens: nodes hold what is kept of the run of tokens that leads to them.

Sequences that begin the same share the nodes of their beginning, and part where they part: at most one node is cut in
two for it (Morrison, PATRICIA, JACM 1968; its use for KV caches is RadixAttention's, Zheng et al., 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from runner.engine.kv.kept import Piece, State

TOKEN: Final = 4
"""Bytes of a token id: tokens are compared as bytes, at memcmp's speed."""


class Node:
    """A run of tokens, as bytes, after those of its parent; `piece` and, maybe, a `state` at its end are kept of it.

    `hits` counts its uses; `priority` and `stamp` are the cache's.
    """

    __slots__ = ("children", "hits", "parent", "piece", "priority", "stamp", "state", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, piece: Piece) -> None:
        self.parent = parent
        self.tokens = tokens
        self.piece = piece
        self.state: State | None = None
        self.children: dict[bytes, Node] = {}
        self.hits = 1
        self.priority = 0.0
        self.stamp = 0
        if parent is not None:
            parent.children[tokens[:TOKEN]] = self

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for it."""
        return self.piece.nbytes + len(self.tokens) + (0 if self.state is None else self.state.nbytes)

    def remove(self) -> None:
        """Leave the tree, with all that is below."""
        assert self.parent is not None
        del self.parent.children[self.tokens[:TOKEN]]

    def split(self, length: int) -> Node:
        """Cut in two after `length` tokens; returns the new first part. Copies what is kept."""
        assert self.parent is not None
        middle = self.piece.start + length
        upper = Node(self.parent, self.tokens[: length * TOKEN], self.piece.part(self.piece.start, middle))
        upper.hits = self.hits
        self.tokens, self.parent = self.tokens[length * TOKEN :], upper
        self.piece = self.piece.part(middle, self.piece.stop)
        upper.children[self.tokens[:TOKEN]] = self
        return upper

    def below(self) -> Iterator[Node]:
        """This node and all that follow on it."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            yield node


def root() -> Node:
    """A tree that holds nothing yet."""
    return Node(None, b"", Piece(0, 0, [], ()))


def walk(tree: Node, tokens: bytes) -> list[tuple[Node, int]]:
    """The nodes along `tokens`, without the root, each with how many of its tokens match; only the last may in part."""
    path, node, at = [], tree, 0
    while (child := node.children.get(tokens[at : at + TOKEN])) is not None:
        length = len(child.tokens)
        if tokens[at : at + length] != child.tokens:
            path.append((child, common(child.tokens, tokens[at : at + length])))
            break
        path.append((child, length // TOKEN))
        node, at = child, at + length
    return path


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes."""
    return array("I", tokens).tobytes()


def common(a: bytes, b: bytes) -> int:
    """Whole tokens that both begin with, by bisection."""
    low, high = 0, min(len(a), len(b)) // TOKEN
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * TOKEN] == b[: middle * TOKEN]:
            low = middle
        else:
            high = middle - 1
    return low
