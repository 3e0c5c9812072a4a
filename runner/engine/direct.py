"""Products of one row's tokens on the CPU, in one operation.

`x @ weight.T` is a view of the weight, one of x without its rows, the product, and a view of that with rows again. A
small model's step takes as long as its operations are many: so a layer keeps its weight as a batch of one matrix, which
a batch of one row is multiplied by as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.column_major import arranged
from runner.engine.joined import PartialLinear

_TURNED: Final = "turned"


class _Direct(nn.Module):  # type: ignore[misc]
    turned: mx.array
    """The weight as [1, inputs, outputs]. No parameter of the layer: it is a view of one."""

    def multiplied(self, x: mx.array) -> mx.array | None:
        """[1, tokens, outputs] for x [1, tokens, inputs]; None for anything else."""
        return x @ self.turned if x.ndim == 3 and x.shape[0] == 1 else None


class DirectLinear(_Direct, nn.Linear):  # type: ignore[misc]
    """A linear layer without a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., inputs]."""
        y = self.multiplied(x)
        return super().__call__(x) if y is None else y


class DirectEmbedding(_Direct, nn.Embedding):  # type: ignore[misc]
    """An embedding that may be the output head as well."""

    def as_linear(self, x: mx.array) -> mx.array:
        """x is [..., width]."""
        y = self.multiplied(x)
        return super().as_linear(x) if y is None else y


_KINDS: Final[dict[Any, Any]] = {nn.Linear: DirectLinear, nn.Embedding: DirectEmbedding}
_PLAIN: Final = frozenset({*_KINDS, *_KINDS.values()})


def install(model: Any) -> None:
    """On the CPU, have the model's plain layers lie as they are multiplied by and be multiplied at once.

    To be called once siblings are joined and before any layer is wrapped. What is new is not computed yet.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for layer in list(plain_layers(model)):
        layer.weight = arranged(layer.weight)
        if "bias" not in layer:
            object.__setattr__(layer, _TURNED, layer.weight.T[None])
            layer.__class__ = _KINDS[type(layer)]


def plain_layers(model: Any) -> Iterator[Any]:
    """Layers that multiply by a weight [outputs, inputs] as it is, those that are joined as one."""
    seen: set[int] = set()
    for module in list(model.modules()):
        layer = module.place[0].layer if type(module) is PartialLinear else module
        if type(layer) in _PLAIN and id(layer) not in seen:
            seen.add(id(layer))
            yield layer
