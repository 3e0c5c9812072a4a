"""How much memory a deployment takes, term by term, before it is started.

Weights, adapters and caches are arithmetic on headers and config.json, within 3 % of what the engine holds
(tests/inspect/test_estimate.py). The peak of a prefill step is a bound fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from runner.inspect.adapter import AdapterFacts
from runner.inspect.caches import Packing, used
from runner.inspect.config import Config
from runner.inspect.layers import Layers
from runner.inspect.memory import ModelMemory
from runner.inspect.model import ModelFacts
from runner.inspect.resident import adapter_bytes
from runner.inspect.tensors import Group
from runner.inspect.weights import activation_itemsize, resident_bytes

_FUSED_HEADS: Final = (64, 80, 96, 128)
"""Widths of heads for which attention over a whole prompt runs without a matrix of scores, off the CPU."""


class Limits(NamedTuple):
    """What the manifest allows a deployment: rows, tokens a row (0: the model's own), tokens of a prefill step, bytes.

    `kv_bits` 0 keeps keys and values as they are computed; else they are from position `kv_start` on.
    """

    rows: int
    context: int
    prefill_step: int
    prefix_cache: int
    kv_bits: int = 0
    kv_group_size: int = 64
    kv_start: int = 0


def model_memory(
    model: ModelFacts,
    adapters: Sequence[AdapterFacts],
    draft: ModelFacts | None,
    limits: Limits,
    *,
    float32: bool,
    layers: Layers | None = None,
    fused: bool | None = None,
) -> ModelMemory:
    """`float32`: everything is computed in it, as the engine does on the CPU. `fused`: attention over a prompt needs no
    matrix of scores where the heads allow it; None for wherever it is not computed in float32.

    `layers` are the model's, None where they are not known: adapters count as they are stored then.
    """
    itemsize = activation_itemsize(model.tensors, float32=float32)
    longest = longest_context(model, limits.context)
    step = min(limits.prefill_step, longest) if longest else limits.prefill_step
    kv = _Rows(model, draft, limits, float32=float32)
    fused = not float32 if fused is None else fused
    return ModelMemory(
        weights=resident_bytes(model.tensors, float32=float32),
        adapters=_adapter_bytes(layers, adapters, itemsize),
        draft=resident_bytes(draft.tensors, float32=float32) if draft is not None else 0,
        kv_per_token=kv.per_token,
        kv_row=kv.row(longest or step),
        rows=limits.rows,
        context=longest,
        prefix_cache=limits.prefix_cache,
        prefill=_prefill_peak(model, step, longest or step, limits, itemsize, fused=fused),
        first=kv.row(step) + _prefill_peak(model, step, step, limits, itemsize, fused=fused),
        exact=model.layout is not None and model.layout.known,
    )


def _adapter_bytes(layers: Layers | None, adapters: Sequence[AdapterFacts], itemsize: int) -> int:
    if layers is None:
        return sum(adapter.nbytes for adapter in adapters)
    return adapter_bytes(adapters, layers, itemsize) if adapters else 0


def longest_context(model: ModelFacts, allowed: int) -> int:
    """Tokens of prompt and answer together: the declared limit within the model's own, 0 for neither."""
    return min((tokens for tokens in (allowed, model.config.max_context) if tokens), default=0)


class _Rows:
    """Bytes of rows: the model's caches, and the draft's, which are never quantised."""

    def __init__(self, model: ModelFacts, draft: ModelFacts | None, limits: Limits, *, float32: bool) -> None:
        packing = Packing(limits.kv_bits, limits.kv_group_size, limits.kv_start) if limits.kv_bits else None
        self._longest = longest_context(model, limits.context)
        self._parts = [
            (part.layout, activation_itemsize(part.tensors, float32=float32), how)
            for part, how in ((model, packing), (draft, None))
            if part is not None and part.layout is not None
        ]

    @property
    def per_token(self) -> int:
        """Of a row that grows by one."""
        return sum(layout.token_bytes(size, used(how, self._longest)) for layout, size, how in self._parts)

    def row(self, tokens: int) -> int:
        """Of a row with so many tokens."""
        return sum(layout.row_bytes(tokens, size, how) for layout, size, how in self._parts)


def _prefill_peak(model: ModelFacts, step: int, context: int, limits: Limits, itemsize: int, *, fused: bool) -> int:
    """Bytes beside the caches while `step` tokens are prefilled.

    Fitted to `mx.get_peak_memory` (tests/inspect/test_estimate.py): about sixteen arrays as wide as the model and three
    as wide as its feed-forward layers, and the attention's scores where no fused kernel has the heads' width.
    """
    config = model.config
    hidden, inner = _width(config, "hidden"), _inner(config, model.tensors)
    scores = 0
    heads = model.layout.head_dims if model.layout is not None else ()
    if not fused or limits.kv_bits or any(dim not in _FUSED_HEADS for dim in heads):
        scores = _width(config, "heads") * context
    logits = limits.rows * config.vocabulary * 3 * 4
    return max(step * (16 * hidden + 3 * inner + scores) * itemsize, logits)


def _width(config: Config, name: str) -> int:
    keys = {
        "hidden": ("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim"),
        "heads": ("num_attention_heads", "n_heads", "n_head", "num_heads"),
    }[name]
    value = config.get(*keys)
    return value if isinstance(value, int) else 0


def _inner(config: Config, tensors: Sequence[Group]) -> int:
    """Width of the feed-forward layers, those of all experts of a token together."""
    dense = config.get("intermediate_size", "ffn_hidden_size", "n_inner")
    expert, used = config.get("moe_intermediate_size"), config.get("num_experts_per_tok", "num_experts_per_token")
    widths = [dense if isinstance(dense, int) else 0]
    if isinstance(used, int) and any("expert" in g.name or "switch" in g.name for g in tensors):
        widths.append(used * (expert if isinstance(expert, int) else widths[0]))
    return max(widths)
