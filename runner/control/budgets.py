"""What each engine may come to, of what all may use: what it needs at least, and its part of what is left."""

from __future__ import annotations

from collections.abc import Sequence

from runner.plan.forecast import least, most, with_process
from runner.plan.spec import ModelSpec


def share_out(limit: int, specs: Sequence[ModelSpec]) -> dict[int, int]:
    """Bytes by the spec's id. Empty without a `limit`, which is in bytes."""
    if not limit:
        return {}
    spare = limit - sum(map(with_process, specs))
    if spare <= 0:  # old and new side by side: plans count models alone then, and so does this
        spare = max(0, limit - sum(map(least, specs)))
    growth = {id(spec): _growth(spec, limit) for spec in specs}
    whole = sum(growth.values()) or 1
    return {id(s): least(s) + min(growth[id(s)], spare * growth[id(s)] // whole) for s in specs}


def _growth(spec: ModelSpec, limit: int) -> int:
    """Bytes that an engine can come to beyond what it needs at least: all there is where its rows' length is not
    known."""
    can_come_to = most(spec)
    if not spec.memory.context or not spec.memory.exact:
        can_come_to = spec.memory_limit_bytes or limit
    return max(0, can_come_to - least(spec))
