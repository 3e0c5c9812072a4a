"""A model's spec and its adapters' as their engine takes them."""

from __future__ import annotations

from pathlib import Path

from runner.options import Options
from runner.plan.spec import AdapterSpec, EngineLimits, ModelSpec
from runner.protocol import AdapterSource, Configure, EngineSpec


def engine_spec(spec: ModelSpec, folder: Path, options: Options, budget: int) -> EngineSpec:
    """What an engine of `spec` is started with. `folder` has its weights, `budget` in bytes is what it may come to."""
    return EngineSpec(
        model=spec.name,
        path=str(folder),
        digest=spec.process_digest,
        adapters=tuple(adapter_source(a) for a in spec.adapters),
        max_rows=spec.limits.max_rows,
        max_queue=spec.limits.max_queue,
        prefill_step_size=spec.limits.prefill_step_size,
        max_context=spec.limits.max_context,
        prefix_cache_bytes=spec.limits.prefix_cache_bytes,
        memory_limit_bytes=spec.memory_limit_bytes,
        budget_bytes=budget,
        row_bytes=spec.memory.kv_row if spec.memory.exact and spec.memory.context else 0,
        working_bytes=spec.memory.working(spec.limits.prefill_step_size),
        draft=str(spec.draft.path) if spec.draft else "",
        num_draft_tokens=spec.limits.num_draft_tokens,
        trust_remote_code=spec.trust_remote_code,
        trust_draft_code=spec.draft is not None and spec.draft.trust_remote_code,
        dtype=spec.dtype,
        kv_bits=spec.kv_cache.bits if spec.kv_cache else 0,
        kv_group_size=spec.kv_cache.group_size if spec.kv_cache else 64,
        kv_start=spec.kv_cache.quantized_start if spec.kv_cache else 0,
        chat_template=str(spec.chat_template.path) if spec.chat_template else "",
        tool_parser=spec.tool_parser,
        orphan_grace=options.orphan_grace,
    )


def adapter_source(adapter: AdapterSpec) -> AdapterSource:
    """An adapter as the engine takes it."""
    return AdapterSource(key=adapter.key, path=str(adapter.path), scale=adapter.scale)


def configure(limits: EngineLimits) -> Configure:
    """Changed limits, for an engine that is up."""
    return Configure(
        max_rows=limits.max_rows,
        max_queue=limits.max_queue,
        prefill_step_size=limits.prefill_step_size,
        max_context=limits.max_context,
        prefix_cache_bytes=limits.prefix_cache_bytes,
        num_draft_tokens=limits.num_draft_tokens,
    )
