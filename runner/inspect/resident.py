"""What adapters take in memory: a slot for each, and one for none, at every place that any of them changes.

As `runner.engine.adapters.stack` keeps them, with layers that the engine computes as one (`runner.engine.joined`)
counted as one: their ranks are side by side there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from runner.inspect.adapter import AdapterFacts
from runner.inspect.fit import targets
from runner.inspect.layers import Layers

_JOINED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FIRST: Final = {names[0]: names for names in _JOINED}


class _Place:
    """`width` is inputs and outputs together (times experts), `ranks` the sum of ranks for each adapter."""

    __slots__ = ("magnitude", "outputs", "ranks", "width")

    def __init__(self, width: int, outputs: int) -> None:
        self.width = width
        self.outputs = outputs
        self.ranks: dict[int, int] = {}
        self.magnitude = False

    @property
    def values(self) -> int:
        """Of one slot."""
        return max(self.ranks.values()) * self.width + (self.outputs if self.magnitude else 0)


def adapter_bytes(adapters: Sequence[AdapterFacts], model: Layers, itemsize: int) -> int:
    """All resident together. Changes of layers that the model lacks are left out: they are refused elsewhere."""
    siblings = dict(_siblings(model))
    places: dict[tuple[str, int], _Place] = {}
    for index, adapter in enumerate(adapters):
        for change in adapter.changes:
            for layer, blocks in targets(change, model):
                for block in _numbers(blocks):
                    name, outputs = siblings.get((layer.path, block), (layer.path, layer.outputs))
                    width = math.prod(layer.experts) * (layer.inputs + outputs)
                    place = places.setdefault((name, block), _Place(width, outputs))
                    place.ranks[index] = place.ranks.get(index, 0) + change.rank
                    place.magnitude |= change.magnitude is not None
    return (len(adapters) + 1) * sum(place.values for place in places.values()) * itemsize


def _siblings(model: Layers) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """(path, block) of each layer that is computed with others to the name of the group and its outputs."""
    found = {(layer.path, block): layer for layer in model.linear for block in _numbers(layer.blocks)}
    for path, block in found:
        parent, _, name = path.rpartition(".")
        names = _FIRST.get(name, ())
        group = [found.get((f"{parent}.{sibling}", block)) for sibling in names]
        layers = [layer for layer in group if layer is not None and not layer.experts]
        if layers and len(layers) == len(names) and len({(x.inputs, x.packing, x.bias) for x in layers}) == 1:
            outputs = sum(layer.outputs for layer in layers)
            yield from (((layer.path, block), (f"{parent}.{'+'.join(names)}", outputs)) for layer in layers)


def _numbers(blocks: int) -> list[int]:
    return [n for n in range(blocks.bit_length()) if blocks >> n & 1] or [-1]
