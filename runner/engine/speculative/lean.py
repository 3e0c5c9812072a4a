"""A draft in fewer operations, on the CPU.

A small model's call takes as long as its operations are many, and a round is several calls of the draft. What a draft
proposes need not be what upstream's model would say to the bit, so here, unlike in the target, constants are part of
the weights (a norm's weight and width, the attention's scale), queries and keys are rotated as one, sums are part of
products, and rows and tokens are one axis wherever they may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache

from runner.engine.column_major import arranged
from runner.engine.kv.attention import attend
from runner.engine.kv.layout import Layout
from runner.engine.loader import LoadedModel

_FEW: Final = 64
"""Tokens of all rows up to which shapes of constants are kept."""

SMALL: Final = 64 * 2**20
"""Bytes of weights. Where a call reads more than that, its operations are the lesser part, and both models are there
for a moment."""


def lean(loaded: LoadedModel, slack: int) -> LoadedModel:
    """The model in fewer operations where that is known to be the same, up to rounding; else as it is.

    The caches of both are the same.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu) and loaded.layout.launch is None
    if not on_cpu or loaded.weights_bytes > SMALL or not _known(loaded.model):
        return loaded
    model = LeanLlama(loaded.model)
    mx.eval(model.arrays)
    weights_bytes = sum(array.nbytes for array in model.arrays)
    return msgspec.structs.replace(loaded, model=model, layout=Layout(model, slack), weights_bytes=weights_bytes)


def _known(model: Any) -> bool:
    """Whether it is a plain Llama, all of it in float32: packed weights are not."""
    if type(model) is not llama.Model or any(layer.use_sliding for layer in model.layers):
        return False
    if any("bias" in module for module in model.modules()):
        return False
    return all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))


class LeanLlama:
    """What upstream's `llama.Model` computes."""

    def __init__(self, model: Any) -> None:
        inner = model.model
        self.layers = [_Layer(layer) for layer in inner.layers]
        self._embeddings: mx.array = inner.embed_tokens.weight
        self._norm = _Scale(inner.norm)
        head = inner.embed_tokens if model.args.tie_word_embeddings else model.lm_head
        self._head = self._norm.before(head.weight)
        # The embeddings of positions share what they make in a call.
        self.turnings = getattr(model, "turnings", ())

    @property
    def arrays(self) -> list[mx.array]:
        """All weights."""
        return [self._embeddings, self._head, *(array for layer in self.layers for array in layer.weights)]

    def make_cache(self) -> list[KVCache]:
        """Upstream's own caches, for one row."""
        return [KVCache() for _ in self.layers]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits [rows, count, vocabulary] for `tokens` [rows, count]."""
        rows, count = tokens.shape
        x = self._embeddings[tokens.reshape(-1)]
        mask = cache[0].make_mask(count)
        for layer, cached in zip(self.layers, cache, strict=True):
            x = layer(x, rows, mask, cached)
        return (self._norm(x) @ self._head).reshape(rows, count, -1)


class _Layer:
    """Attention and MLP; activations are [rows · count, width]."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads, self._groups = attention.n_heads, attention.n_kv_heads
        self._rope = attention.rope
        self._attention_norm, self._mlp_norm = _Scale(layer.input_layernorm), _Scale(layer.post_attention_layernorm)
        parts = [attention.q_proj.weight * attention.scale, attention.k_proj.weight, attention.v_proj.weight]
        both = [mlp.gate_proj.weight, mlp.up_proj.weight]
        self.weights = (
            self._attention_norm.before(mx.concatenate(parts)),
            arranged(attention.o_proj.weight).T,
            self._mlp_norm.before(mx.concatenate(both)),
            arranged(mlp.down_proj.weight).T,
        )

    def __call__(self, x: mx.array, rows: int, mask: Any, cache: Any) -> mx.array:
        """[rows · count, width] of the same."""
        projection, output, up, down = self.weights
        attended = self._attend(self._attention_norm(x) @ projection, rows, mask, cache)
        x = mx.addmm(x, attended, output)
        gate, through = mx.split(self._mlp_norm(x) @ up, 2, axis=-1)
        # By its name there, which other rooms may have given another meaning.
        return mx.addmm(x, llama.swiglu(gate, through), down)

    def _attend(self, projected: mx.array, rows: int, mask: Any, cache: Any) -> mx.array:
        """[rows · count, heads · width] for queries, keys and values side by side."""
        groups, turning = self._groups, self._heads + self._groups
        count = projected.shape[0] // rows
        lines = (
            projected.reshape(rows, turning + groups, 1, -1)
            if count == 1
            else projected.reshape(rows, count, turning + groups, -1).swapaxes(1, 2)
        )
        turned, values = mx.split(lines, [turning], axis=1)
        queries, keys = mx.split(self._rope(turned, offset=cache.offset), [self._heads], axis=1)
        keys, values = cache.update_and_fetch(keys, values)
        attended = attend(queries, keys, values, cache, 1.0, mask)
        return (attended if count == 1 else attended.swapaxes(1, 2)).reshape(rows * count, -1)


class _Scale:
    """A norm, but for the constants that the weights after it have taken over."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        width = norm.weight.shape[0]
        self._constant = norm.weight * math.sqrt(width)
        self._epsilon = mx.array(norm.eps * width)
        self._kept: dict[int, mx.array] = {}

    def before(self, weight: mx.array) -> mx.array:
        """A weight [outputs, inputs] as [inputs, outputs], for what comes out of this."""
        return arranged(weight * self._constant).T

    def __call__(self, x: mx.array) -> mx.array:
        """x is [lines, width]."""
        least = self._least(x.shape[0])
        alone = x.shape[0] == 1
        squares = mx.addmm(least, x, x.T) if alone else mx.square(x).sum(axis=-1, keepdims=True) + least
        return x * mx.rsqrt(squares)

    def _least(self, lines: int) -> mx.array:
        if lines > _FEW:
            return self._epsilon
        if lines not in self._kept:
            self._kept[lines] = mx.broadcast_to(self._epsilon, (lines, 1))
            mx.eval(self._kept[lines])
        return self._kept[lines]
