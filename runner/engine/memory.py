"""How many rows a declared memory limit has room for.

MLX takes its own limit as a hint, and on Metal an allocation too many ends the process; what holds is not to start a
row whose tokens have no room, up to its end. One that asked for no length ends when there is no more room, as it would
at the end of the model's context. What is counted is exact where it can be (weights, adapters, kept prefixes) and an
upper bound for the batch, whose rows are padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx
import msgspec
from msgspec.structs import replace

from runner.engine.kv.layout import Layout
from runner.engine.kv.masks import FEW
from runner.engine.kv.sizes import AS_NEEDED, Sizes

if TYPE_CHECKING:
    from runner.engine.row import Row

_PROBE: Final = 256
"""Tokens. Upstream's caches grow by as many at a time."""

_AHEAD: Final = 256
"""Tokens that a row which asked for no length is counted with beyond those it has: its end is not known."""

_AT_ONCE: Final = 512
"""Tokens ahead that there is room for at once, however few a row has: many ask for more than they will get."""


class MemoryBudget(msgspec.Struct):
    """`limit` and `weights` are bytes; `row` says what the caches of all layers take for a row with room for so many
    tokens.

    `granted` is what may be used for now, below the limit, or in its place where that is 0; 0 for as much as the
    limit. `working` bytes are left for what is computed. A row takes `row_bytes` at most, however long it gets: where
    windows bound most layers that is far less than its tokens would; 0 where nobody knows. With neither limit nor
    grant everything fits. Caches are of such `sizes`.
    """

    limit: int
    weights: int
    row: Callable[[int], float]
    granted: int = 0
    working: int = 0
    row_bytes: int = 0
    sizes: Sizes = AS_NEEDED

    @property
    def most(self) -> int:
        """Bytes that may be used now, 0 for any number."""
        return min((size for size in (self.limit, self.granted) if size), default=0)

    def held(self, rows: Sequence[Row], kept: int) -> int:
        """Bytes of `rows` in one batch, up to their ends, beside `kept` bytes of other things."""
        return int(self.weights + kept + self.working + self.caches(rows))

    def caches(self, rows: Sequence[Row]) -> float:
        """Bytes of a batch of rows, up to their ends."""
        # As many as there is room for, not as there are: a batch grows by a third, and its rows by steps.
        return self.room(len(rows) + len(rows) // 3, self.sizes.tokens(longest(rows)))

    def room(self, slots: int, tokens: int) -> float:
        """Bytes of so many slots with room for so many tokens each."""
        each = self.row(tokens)
        return slots * (min(each, self.row_bytes) if self.row_bytes else each)

    def has(self, slots: int, tokens: int, kept: int) -> bool:
        """Whether there is memory for so many slots of so many tokens, beside `kept` bytes of other things."""
        return not self.most or self.weights + kept + self.working + self.room(slots, tokens) <= self.most

    def excess(self, rows: Sequence[Row], kept: int) -> int:
        """Bytes by which that exceeds what may be used now; 0 or less fits."""
        return self.held(rows, kept) - self.most if self.most else -1

    def never(self, rows: Sequence[Row], kept: int) -> bool:
        """Whether it exceeds the limit itself, which does not change."""
        return bool(self.limit) and self.held(rows, kept) > self.limit


def open_ended(rows: Sequence[Row]) -> Row | None:
    """The longest of those that asked for no length, and so may end when memory does; None where there is none."""
    return max((row for row in rows if row.open_ended and not row.done), key=_tokens, default=None)


def longest(rows: Sequence[Row]) -> int:
    """Tokens that the longest of them is counted with."""
    return max((_tokens(row) for row in rows), default=0)


def coming(row: Row) -> int:
    """Tokens that a row is to have room for from the start: up to its end, or twice as many as it has.

    Never more than it is counted with.
    """
    have = len(row.prompt) + len(row.generated)
    return min(_tokens(row), have + max(have, _AT_ONCE))


def _tokens(row: Row) -> int:
    """Tokens that a row will hold at its end; of one that asked for no length, those that it will hold soon."""
    end = len(row.prompt) + row.max_tokens
    return min(len(row.prompt) + len(row.generated) + _AHEAD, end) if row.open_ended else end


def cache_bytes(model: Any, layout: Layout) -> Callable[[int], float]:
    """What the caches take for a row with room for so many tokens, in bytes.

    Where tokens are packed from a position on, rows have room for all in both ways if one of them is beyond it, though
    for plain ones not much further.
    """
    how = layout.quantisation
    if how is None or not how.start:
        each = cache_bytes_per_token(model, layout)
        return lambda tokens: each * tokens
    plain, packed = (cache_bytes_per_token(model, layout.quantised(other)) for other in (None, replace(how, start=0)))
    most, start = how.start + FEW, how.start
    return lambda tokens: tokens * plain if tokens <= start else tokens * packed + min(tokens, most) * plain


def cache_bytes_per_token(model: Any, layout: Layout) -> float:
    """From the shapes of a call that is never computed. Sliding windows and states that do not grow count as if they
    did, once."""
    caches = layout.new()
    caches.call(model, mx.zeros((1, _PROBE), dtype=mx.uint32))
    return caches.nbytes / _PROBE


def ask_for(limit: int) -> None:
    """Tell MLX of a limit in bytes; 0 for its own default.

    On Metal the model's memory is also wired, so that it is not paged out between requests.
    """
    if limit:
        mx.set_memory_limit(limit)
    if mx.metal.is_available():
        wired = int(mx.device_info().get("max_recommended_working_set_size", 0))
        if wired:
            mx.set_wired_limit(min(wired, limit) if limit else wired)
