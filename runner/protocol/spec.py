"""What an engine process is told before it begins: a file beside its socket."""

from __future__ import annotations

import msgspec


class AdapterSource(msgspec.Struct, frozen=True):
    """A LoRA adapter to hold resident. `key` is its identity; `scale` replaces the adapter's own when given."""

    key: str
    path: str
    scale: float | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process needs to serve one model. Written as JSON beside its socket, mode 0600.

    `digest` identifies what cannot change without a new process; `prefix_cache_bytes`, `memory_limit_bytes` are bytes;
    `budget_bytes` is what memory it may come to for now, 0 for as much as the limit, and `working_bytes` of it are
    left for what is computed; `row_bytes` is the most that a row keeps however long it gets, 0 if not known;
    `max_context` is tokens (prompt + completion), 0 for the model's own; `prefill_step_size` is tokens per prefill
    chunk; `draft` is the folder of a draft model, "" for none, which proposes `num_draft_tokens` at a time at most;
    `trust_remote_code` and `trust_draft_code` let the Python code in the folder of either be run;
    `dtype` is what the model computes in, "" for its own (float32 on the CPU); `kv_bits` quantise the KV cache, in
    groups of `kv_group_size` values, 0 not, for positions from `kv_start` on; `chat_template` is a file in place of the
    model's own, "" for that; `tool_parser` names the convention of tool calls, "" for what the chat template tells;
    `orphan_grace` is how long, in seconds, the engine waits without a runner before it exits; `control_group` is the
    folder of a group that the engine enters before it allocates, "" for none.
    """

    model: str
    path: str
    digest: str
    adapters: tuple[AdapterSource, ...] = ()
    max_rows: int = 32
    max_queue: int = 1024
    prefill_step_size: int = 512
    max_context: int = 0
    prefix_cache_bytes: int = 0
    memory_limit_bytes: int = 0
    budget_bytes: int = 0
    working_bytes: int = 0
    row_bytes: int = 0
    draft: str = ""
    num_draft_tokens: int = 0
    trust_remote_code: bool = False
    trust_draft_code: bool = False
    dtype: str = ""
    kv_bits: int = 0
    kv_group_size: int = 64
    kv_start: int = 0
    chat_template: str = ""
    tool_parser: str = ""
    orphan_grace: float = 5.0
    control_group: str = ""
