"""Exponentials on x86 processors, where MLX computes them one number at a time.

Its CPU backend is vectorised for Apple's processors. In the builds for Linux on x86 `mx.exp`, `mx.sigmoid`, `mx.tanh`
and `mx.softmax` take 19 to 24 ns a number, where a product or a sum takes 0.4; `mx.power` is glibc's `powf`, which
takes 6. So here e^-x is 0.3678794^x, in an operation or two more, where numbers are enough to be worth it.

The base is rounded to float32, 2.5e-8 off, so what e^x is off by grows with x: at most 2.1e-6 of it for x in [-80, 0],
3.1e-7 in [-10, 0] (MLX's: 3.8e-6 and 5.3e-7). SwiGLU's gate is off by at most 8.3e-7 of it in [-30, 30] (1.9e-6).

Polynomials of MLX's vectorised operations take ten or more of them: 4.6 to 5.3 ns a number where numbers are many, more
than `powf` where they are not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models import activations

from runner.engine import environment

# On a Mac MLX's own are vectorised.
_SLOW: Final = mx.default_device() == mx.Device(mx.cpu) and environment.linux_on_x86()

_GATES: Final = 512
"""Numbers from which a gate is computed here."""

_SCORES: Final = 1536
"""Numbers from which a softmax is."""

_BASE: Final = 1 / math.e


def pays(size: int, *arrays: mx.array) -> bool:
    """Whether the softmax of `size` scores, made of `arrays`, is faster here."""
    return _SLOW and size >= _SCORES and all(array.dtype == mx.float32 for array in arrays)


def softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Weights of `scores` [..., keys], the largest of which is 1, and their sums [..., 1], which whoever has used the
    weights is to divide by. A score of float32's least number weighs nothing beside others, and as much as its like."""
    weights = mx.power(_BASE, scores.max(axis=-1, keepdims=True) - scores)
    return weights, weights.sum(axis=-1, keepdims=True)


def weighted(scores: mx.array, product: Callable[[mx.array], mx.array]) -> mx.array:
    """`product` of the softmax of `scores` along the last axis with something."""
    if not pays(scores.size, scores):
        return product(mx.softmax(scores, axis=-1, precise=True))
    weights, sums = softmax(scores)
    return product(weights) / sums


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """[...] silu(gate) · x. An e^-gate that is too large for float32 makes it 0, as it should."""
    if gate.size < _GATES or gate.dtype != mx.float32:
        usual: mx.array = activations.swiglu(gate, x)
        return usual
    return gate / (mx.power(_BASE, gate) + 1.0) * x


def precise_swiglu(h: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    """The same of any types, computed in float32, of h's type."""
    return swiglu(gate.astype(mx.float32), x.astype(mx.float32)).astype(h.dtype)


_OURS: Final[dict[str, Any]] = {"swiglu": swiglu, "precise_swiglu": precise_swiglu}


def install(model: Any) -> None:
    """Let the modules that `model` is made of call these where they call upstream's. It has no other place for them."""
    if not _SLOW:
        return
    for module in {type(module).__module__ for module in model.modules()}:
        for name, ours in _OURS.items():
            if getattr(sys.modules.get(module), name, None) is getattr(activations, name):
                setattr(sys.modules[module], name, ours)
