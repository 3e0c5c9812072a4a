"""What upstream's models carry from a cache to their attention when one launch is to do both.

A model asks its cache to write new keys and values and to return all, and hands that to the attention. Here it gets an
object in their place, and the attention, which is ours (`attention.install`), finds in it what the launch needs. A call
that the launch cannot do (a mask that is not the cache's own, sinks, an odd width) is done in separate operations then.
A model that looks into its keys itself trips over the object: `compatibility.fuses` finds that when it is loaded.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from runner.engine.kv.masks import Mask


class Writes(Protocol):
    """A layer's cache, to what it has handed out."""

    def attend(self, queries: Any, keys: Any, values: Any, scale: float, mask: Mask) -> mx.array | None:
        """Write and attend in one launch, [rows, heads, tokens, width]; None if that cannot be, and nothing is done."""
        ...

    def write(self, keys: Any, values: Any) -> None:
        """Write in separate operations."""
        ...

    def keys_and_values(self) -> tuple[Any, Any]:
        """[rows, groups, tokens, width], the call's own included, which are written."""
        ...


class Unwritten:
    """New `keys` and `values` [rows, groups, tokens, width] on their way into a cache, and all that is in it.

    Keys may be `Unrotated`.
    """

    def __init__(self, layer: Writes, keys: Any, values: Any) -> None:
        self._layer = layer
        self._keys = keys
        self._values = values
        self._written = False

    def attend(self, queries: Any, scale: float, mask: Mask, sinks: mx.array | None) -> mx.array | None:
        """[rows, heads, tokens, width], and they are written; None if one launch cannot do it."""
        if self._written or sinks is not None:
            return None
        attended = self._layer.attend(queries, self._keys, self._values, scale, mask)
        self._written = attended is not None
        return attended

    def fetch(self) -> tuple[Any, Any]:
        """What upstream's caches return; they are written in separate operations, if they are not yet."""
        if not self._written:
            self._layer.write(self._keys, self._values)
            self._written = True
        return self._layer.keys_and_values()

    def settle(self) -> None:
        """The call is over: whatever the model has done with them, they are written."""
        if not self._written:
            self.fetch()
