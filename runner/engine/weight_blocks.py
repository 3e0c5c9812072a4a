"""Weights in blocks of 64 outputs on the CPU, for products of few tokens.

OpenBLAS multiplies small matrices as they lie (`column_major.py` says which). But with more than a few tokens a weight
of a small model is too large for that; and of one that lies as its transpose 64 outputs, which is what the innermost
loop takes at once, are kilobytes away from the same outputs of the next input. Here what belongs to 64 outputs lies
together, [outputs / 64, inputs, 64], and a product is a batch of small ones. It is the layout that libraries of matrix
products pack weights into ahead of time (BLIS' micro-panels, oneDNN's blocked formats); here it is the only one, so
that a weight is in memory once. With one token a product of 576 inputs and 1,536 outputs takes 0.4 of the time, with 4
tokens 0.25, with 8 tokens 0.36, with 64 tokens 1.05 times as long, and with 256 tokens 1.1 to 1.25.

Where BLAS has no products of small matrices, which OpenBLAS has for processors with AVX-512, blocks are slower. So both
ways are tried, once in a process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import environment

SWITCH: Final = "MLX_RUN_BLOCKS"
"""Environment variable that turns them off, with 0."""

LINES: Final = 64
"""Outputs of a block."""

_LEAST: Final = 1 << 16
"""Numbers of a weight from which its product takes longer than an operation more."""

_MOST: Final = 2_000_000
"""And up to which: prompts lose more than they do with smaller ones."""

_MOST_INPUTS: Final = 1024
"""Inputs with which a block's product with 15 tokens is small."""

_TRIED: Final = (640, 256)
_TOKENS: Final = 8
_PRODUCTS: Final = 4
_REPEAT: Final = 3
_GAIN: Final = 1.2
"""Outputs, inputs and tokens of the products that are timed, how many together, how often, and how many times as fast
they have to be."""


def multiply(x: mx.array, blocks: mx.array) -> mx.array:
    """[..., outputs] for x [..., inputs] and blocks [outputs / lines, inputs, lines]."""
    count, inputs, lines = blocks.shape
    tokens = x.size // inputs
    y = x.reshape(1, tokens, inputs) @ blocks
    return (y if tokens == 1 else y.swapaxes(0, 1)).reshape(*x.shape[:-1], count * lines)


def fit(weight: mx.array, parts: Sequence[int]) -> bool:
    """Whether a weight [outputs, inputs], of layers with so many outputs each, is one whose blocks are faster here."""
    size, inputs = weight.size, weight.shape[1]
    right = weight.dtype == mx.float32 and inputs <= _MOST_INPUTS and _LEAST <= size <= _MOST
    return right and all(outputs % LINES == 0 for outputs in parts) and pay()


def laid_out(weight: mx.array) -> mx.array:
    """[outputs / LINES, inputs, LINES] of a weight [outputs, inputs], not computed yet."""
    return mx.contiguous(weight.reshape(-1, LINES, weight.shape[1]).swapaxes(1, 2))


@cache
def pay() -> bool:
    """Whether blocks are faster here."""
    if mx.default_device() != mx.Device(mx.cpu) or os.environ.get(SWITCH) == "0":
        return False
    return environment.linux_on_x86() and faster()


def faster(clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether products of few tokens take less time by blocks than by weights that lie as their transpose."""
    outputs, inputs = _TRIED
    x = mx.zeros((_TOKENS, inputs))
    # Each product has a weight of its own, as in a model: one that is in no cache near the processor.
    weights = [mx.zeros((inputs, outputs)) for _ in range(_PRODUCTS)]
    blocks = [mx.zeros((outputs // LINES, inputs, LINES)) for _ in range(_PRODUCTS)]
    mx.eval(x, weights, blocks)

    def seconds(products: list[mx.array]) -> float:
        began = clock()
        mx.eval(products)
        return clock() - began

    timed = [
        (seconds([x @ weight for weight in weights]), seconds([multiply(x, one) for one in blocks]))
        for _ in range(_REPEAT)
    ]
    return min(usual for usual, _ in timed) >= _GAIN * min(blocked for _, blocked in timed)
