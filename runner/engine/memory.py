"""How many rows a declared memory limit has room for.

MLX takes its own limit as a hint, and on Metal an allocation too many ends the process; what holds is not to start a
row whose tokens have no room. What is counted is exact where it can be (weights, adapters, kept prefixes) and an upper
bound for the batch, whose rows are padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from runner.engine.kv.caches import Layout
from runner.engine.row import Row

_PROBE: Final = 256
"""Tokens. Upstream's caches grow by as many at a time."""

_AHEAD: Final = 256
"""Tokens that a running row is counted with beyond those it has: its end is not known."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """`limit` and `weights` are bytes; `token_bytes` is what the caches of all layers take for one token of one row."""

    limit: int
    weights: int
    token_bytes: float

    def excess(self, rows: Sequence[Row], kept: int) -> int:
        """Bytes by which `rows` in one batch, beside `kept` bytes of other things, exceed the limit; 0 or less fits."""
        tokens = len(rows) * max((_tokens(row) for row in rows), default=0)
        return int(self.weights + kept + tokens * self.token_bytes) - self.limit


def _tokens(row: Row) -> int:
    """Tokens that a row holds, or will soon."""
    held = len(row.prompt) + len(row.generated)
    return min(held + _AHEAD, len(row.prompt) + row.max_tokens)


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
