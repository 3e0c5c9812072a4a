"""Root mean square norms on the CPU, with constants that need not be made for each call.

`mx.fast.rms_norm` has no kernel there: it is some eleven operations, four of which bring constants and the weight to
the input's shape. A small model's step takes as long as its operations are many. For a few tokens a norm keeps them in
the shapes that it has seen. What comes out is the same to the bit: the products and sums are MLX's own.
"""

from __future__ import annotations

from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

_FEW: Final = 16
"""Tokens of all rows up to which shapes are kept: so there are at most some fifty of them."""

_NUMBERS: Final = "numbers"
_KEPT: Final = "kept"

Constants = tuple[mx.array, mx.array, mx.array]
"""One over the width, and epsilon, as [rows, tokens, 1]; the weight as [rows, tokens, width]."""


class KeepingNorm(nn.RMSNorm):  # type: ignore[misc]
    """A norm that keeps its constants."""

    numbers: tuple[mx.array, mx.array]
    """One over the width, and epsilon."""

    kept: dict[tuple[int, ...], Constants]

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., width]. Whatever is not known to be the same is left to upstream."""
        shape = x.shape
        if x.ndim != 3 or x.dtype != mx.float32 or shape[0] * shape[1] > _FEW:
            whole: mx.array = super().__call__(x)
            return whole
        if shape not in self.kept:
            self.kept[shape] = self._in_shape(shape)
        share, epsilon, weight = self.kept[shape]
        scale = mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) * share + epsilon)
        normed: mx.array = x * scale * weight
        return normed

    def _in_shape(self, shape: tuple[int, ...]) -> Constants:
        share, epsilon = (mx.broadcast_to(number, (*shape[:-1], 1)) for number in self.numbers)
        made = share, epsilon, mx.broadcast_to(self.weight, shape)
        mx.eval(made)  # as views, which take no memory of their own
        return made


def install(model: Any) -> None:
    """On the CPU, have the model's plain norms of float32 keep their constants."""
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for module in list(model.modules()):
        if type(module) is nn.RMSNorm and module.weight.dtype == mx.float32:
            share, epsilon = mx.array(1 / module.weight.shape[0]), mx.array(module.eps)
            mx.eval(share, epsilon)
            object.__setattr__(module, _NUMBERS, (share, epsilon))
            object.__setattr__(module, _KEPT, {})
            module.__class__ = KeepingNorm
