"""What the engine is allowed, and what it has done."""

from __future__ import annotations

import msgspec

from runner.protocol import Configure, EngineSpec


class Limits(msgspec.Struct, frozen=True):
    """What can be changed in place; see protocol.EngineSpec."""

    max_rows: int = 32
    max_queue: int = 1024
    prefill_step_size: int = 512
    max_context: int = 0
    prefix_cache_bytes: int = 0
    num_draft_tokens: int = 0

    @classmethod
    def of(cls, spec: EngineSpec) -> Limits:
        """The limits an engine starts with."""
        return cls(
            max_rows=spec.max_rows,
            max_queue=spec.max_queue,
            prefill_step_size=spec.prefill_step_size,
            max_context=spec.max_context,
            prefix_cache_bytes=spec.prefix_cache_bytes,
            num_draft_tokens=spec.num_draft_tokens,
        )

    def changed(self, change: Configure) -> Limits:
        """These, with what `change` names replaced; memory is not among them."""
        given = {name: value for name in change.__struct_fields__ if (value := getattr(change, name)) is not None}
        given.pop("memory_limit_bytes", None)
        return msgspec.structs.replace(self, **given)


class Counters(msgspec.Struct):
    """Totals since the engine started; see protocol.Stats."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    failed: int = 0
    drafted: int = 0
    accepted: int = 0
