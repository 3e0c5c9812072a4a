"""Changes to one layer, drawn."""

from __future__ import annotations

import mlx.core as mx

from runner.engine.adapters.stack import Change, Stack


def draw(shape: tuple[int, ...], seed: int, dtype: mx.Dtype) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) / shape[0] ** 0.5).astype(dtype)


def joined(inputs: int, parts: list[tuple[int, int]], seed: int, dtype: mx.Dtype) -> Change:
    """A change to parts of (outputs, rank) each."""
    rank = sum(r for _, r in parts)
    b = mx.zeros((rank, sum(outputs for outputs, _ in parts)), dtype)
    spans, end, low = [], 0, 0
    for outputs, r in parts:
        b[low : low + r, end : end + outputs] = draw((max(r, 1), outputs), seed + end, dtype)[:r]
        end += outputs
        spans.append((end, low, low + r))
        low += r
    return Change(draw((inputs, rank), seed, dtype), b, None, tuple(spans))


def stacked(inputs: int, changes: list[list[tuple[int, int]]], dtype: mx.Dtype) -> Stack:
    """A stack of such changes, in slots 1 and up. An empty one is none."""
    like = next(parts for parts in changes if parts)
    stack = Stack.empty(1, joined(inputs, like, 1, dtype))
    for seed, parts in enumerate(changes):
        stack = stack.appended(joined(inputs, parts, 10 * seed, dtype)) if parts else stack.appended_nothing()
    return stack


def of_two_parts(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, most: tuple[int, int]) -> Stack:
    """A stack for a gate and its input of so many outputs each ("swiglu"), or for halves of the outputs.

    Slots: none, few ranks, the `most`, no rank in one part, nothing.
    """
    if epilogue == "swiglu":
        ranks = [(3, 3), most, (0, 5)]
    else:
        outputs, ranks = outputs // 2, [(2, 1), most, (0, 4)]
    parts = [[(outputs, first), (outputs, second)] for first, second in ranks]
    return stacked(inputs, [*parts, []], dtype)


def weight_of(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> mx.array:
    """Of the layer itself: sums of its products with normal tokens are about 1."""
    weight = draw((outputs * (2 if epilogue == "swiglu" else 1), inputs), 1, dtype)
    return (weight * (weight.shape[0] / inputs) ** 0.5).astype(dtype)
