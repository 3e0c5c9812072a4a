"""One product for several linear layers that read the same input.

A decode step of a small batch takes as long as the host takes to launch its operations, and a large one reads its
weights once a product; both gain when the projections of queries, keys and values are one product, and so are those of
an MLP's gate and its input. Upstream's models go on calling the layers one by one: the first call computes the product
for all of them, and the others take their parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.column_major import arranged, parted
from runner.engine.weight_blocks import fit

_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that upstream's models give one input, if they have one parent."""


class JoinedLayers:
    """Linear layers over one input, as one. `layer` is their product, and may be wrapped or replaced."""

    def __init__(self, layers: Sequence[Any]) -> None:
        """Raises ValueError when the layers cannot be one (other inputs, packings, biases), or had better not."""
        self.layer: Any = _join(layers)
        self.outputs = [int(layer.weight.shape[0]) for layer in layers]
        self.products = 0
        self._cuts = [sum(self.outputs[: i + 1]) for i in range(len(layers) - 1)]
        self._x: mx.array | None = None
        self._parts: list[mx.array | None] = []

    def part(self, index: int, x: mx.array) -> mx.array:
        """What layer `index` alone would give for `x` [..., in]."""
        found = self._parts[index] if x is self._x else None
        if found is None:
            self.products += 1
            self._x, self._parts = x, [*mx.split(self.layer(x), self._cuts, axis=-1)]
            found = self._parts[index]
            assert found is not None
        self._parts[index] = None
        if not any(part is not None for part in self._parts):
            # Nothing may hold on to activations after the call.
            self._x, self._parts = None, []
        return found

    def forget(self) -> None:
        """Let go of a call that failed half-way."""
        self._x, self._parts = None, []


class _Part(nn.Module):  # type: ignore[misc]
    """One layer of a group that is computed at once."""

    def __init__(self, joined: JoinedLayers, index: int, **arrays: mx.array) -> None:
        nn.Module.__init__(self)
        self._joined, self._index = joined, index
        for name, array in arrays.items():
            self[name] = array

    @property
    def place(self) -> tuple[JoinedLayers, int]:
        """The group, and the index in it."""
        return self._joined, self._index

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., in]."""
        return self._joined.part(self._index, x)


class PartialLinear(_Part, nn.Linear):  # type: ignore[misc]
    """A linear layer that is computed with its siblings. Its weight is a view of theirs."""


class PartialQuantizedLinear(_Part, nn.QuantizedLinear):  # type: ignore[misc]
    """The same for packed weights."""

    def __init__(self, joined: JoinedLayers, index: int, **arrays: mx.array) -> None:
        super().__init__(joined, index, **arrays)
        self.group_size, self.bits, self.mode = joined.layer.group_size, joined.layer.bits, joined.layer.mode


def join_siblings(model: Any, try_out: Callable[[], object]) -> int:
    """Join what can be; returns how many products are saved in a call of the model.

    `try_out` builds one call (it need not be computed): siblings that turn out to have different inputs are parted.
    """
    joined = list(_join_all(model))
    try:
        try_out()
    finally:
        for _, group, _ in joined:
            group.forget()
    saved = 0
    for parent, group, layers in joined:
        if group.products > 1:
            parent.update_modules(layers)
        else:
            saved += len(layers) - 1
    return saved


def joined_of(layer: Any) -> tuple[JoinedLayers, int] | None:
    """The group that a layer is part of, and its index there."""
    if isinstance(layer, PartialLinear | PartialQuantizedLinear):
        return layer.place
    return None


def _join_all(model: Any) -> Iterator[tuple[Any, JoinedLayers, dict[str, Any]]]:
    for _, parent in model.named_modules():
        for names in _SIBLINGS:
            layers = {name: parent[name] for name in names if name in parent}
            if len(layers) != len(names):
                continue
            try:
                group = JoinedLayers(list(layers.values()))
            except ValueError:
                continue
            parent.update_modules(dict(zip(names, _parts(group), strict=True)))
            yield parent, group, layers


def _parts(group: JoinedLayers) -> Iterator[Any]:
    kind = PartialQuantizedLinear if isinstance(group.layer, nn.QuantizedLinear) else PartialLinear
    first = 0
    for index, outputs in enumerate(group.outputs):
        arrays = {name: array[first : first + outputs] for name, array in _arrays(group.layer).items()}
        yield kind(group, index, **arrays)
        first += outputs


def _join(layers: Sequence[Any]) -> Any:
    first = layers[0]
    kind = type(first)
    if kind not in (nn.Linear, nn.QuantizedLinear) or any(type(layer) is not kind for layer in layers):
        raise ValueError("not plain linear layers")
    if kind is nn.QuantizedLinear and len({(layer.group_size, layer.bits, layer.mode) for layer in layers}) > 1:
        raise ValueError("packed in different ways")
    arrays = [_arrays(layer) for layer in layers]
    if any(other.keys() != arrays[0].keys() for other in arrays):
        raise ValueError("some have a bias")
    for name, array in arrays[0].items():
        if any(other[name].shape[1:] != array.shape[1:] or other[name].dtype != array.dtype for other in arrays):
            raise ValueError("of different inputs or types")
    if kind is nn.Linear and parted([layer.weight for layer in layers]):
        raise ValueError("small enough to be fast apart, and too large to be so together")
    joined: Any = dict.__new__(kind)
    nn.Module.__init__(joined)
    if kind is nn.QuantizedLinear:
        joined.group_size, joined.bits, joined.mode = first.group_size, first.bits, first.mode
    for name in arrays[0]:
        joined[name] = mx.concatenate([other[name] for other in arrays])
    if kind is nn.Linear:
        # Before it is divided: the parts are views of it. Blocks are laid out later.
        blocks = fit(joined.weight, [layer.weight.shape[0] for layer in layers])
        joined.weight = joined.weight if blocks else arranged(joined.weight)
    return joined


def _arrays(layer: Any) -> dict[str, mx.array]:
    """The layer's own arrays: weight, scales, biases, bias. All have the outputs first."""
    return {name: value for name, value in layer.items() if isinstance(value, mx.array)}
