"""`mlx-run validate --memory`: what each model takes, term by term, beside what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from runner.inspect.memory import ModelMemory
from runner.manifest.values import format_size
from runner.plan.memory import MemoryBudget
from runner.plan.spec import ModelSpec

_HEADS: Final = (
    "model",
    "weights",
    "adapters",
    "draft",
    "KV a token",
    "KV at most",
    "prefix cache",
    "prefill peak",
    "total",
)


def memory_table(models: Sequence[ModelSpec], budget: MemoryBudget) -> str:
    """Lines for a terminal, the widest first column left, sizes right; no final line break."""
    rows = [_row(model.name, model.memory, model.memory_limit_bytes) for model in models]
    if len(models) > 1:
        rows.append(["all", "", "", "", "", "", "", "", format_size(sum(model.memory.most for model in models))])
    widths = [max(len(row[i]) for row in (list(_HEADS), *rows)) for i in range(len(_HEADS))]
    lines = ["  ".join(_cell(i, text, widths) for i, text in enumerate(row)).rstrip() for row in (_HEADS, *rows)]
    lines += [_remark(model) for model in models if _remark(model)]
    lines.append(f"may be used: {budget.explained}")
    return "\n".join(lines)


def _cell(index: int, text: str, widths: Sequence[int]) -> str:
    return text.rjust(widths[index]) if index else text.ljust(widths[index])


def _row(name: str, memory: ModelMemory, limit: int) -> list[str]:
    rows = f" ({memory.rows} × {memory.context})" if memory.context else ""
    total = format_size(memory.most) + (f" (limit {format_size(limit)})" if limit else "")
    return [
        name + ("" if memory.exact else " *"),
        format_size(memory.weights),
        format_size(memory.adapters) if memory.adapters else "-",
        format_size(memory.draft) if memory.draft else "-",
        format_size(memory.kv_per_token) if memory.kv_per_token else "-",
        (format_size(memory.kv_max) if memory.kv_max else "-") + rows,
        format_size(memory.prefix_cache) if memory.prefix_cache else "-",
        format_size(memory.prefill) if memory.prefill else "-",
        total,
    ]


def _remark(model: ModelSpec) -> str:
    """What a limit means for a model, or why its numbers are none."""
    memory, limit = model.memory, model.memory_limit_bytes
    if not memory.exact:
        return f"* {model.name}: the weights are exact, the rest is a guess"
    if limit and memory.context and memory.rows_within(limit) < memory.rows:
        return (
            f"{model.name}: {memory.rows_within(limit)} of {memory.rows} rows fit its limit at {memory.context} tokens"
        )
    return ""


def memory_json(models: Sequence[ModelSpec], budget: MemoryBudget) -> dict[str, Any]:
    """The same as plain data, in bytes and tokens."""
    return {
        "usable_bytes": budget.usable,
        "models": {
            model.name: model.memory._asdict()
            | {
                "least": model.memory.least,
                "kv_max": model.memory.kv_max,
                "total": model.memory.most,
                "memory_limit": model.memory_limit_bytes,
            }
            for model in models
        },
    }
