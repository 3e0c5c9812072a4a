"""Products of few tokens with large weights on the CPU, a tile of the weight at a time.

BLAS copies what it multiplies into an order of its own first. With few tokens that is what a product takes: the weight
is read, written, and read again. OpenBLAS multiplies small matrices as they lie (`column_major.py` says which), so here
a weight is a batch of small ones, which are views of it, and the product one operation as before: with up to 32 tokens,
and fewer where there are more than 3,900 inputs (15 of 8,192). For weights of 2,048
inputs and 8,192 outputs it takes 0.29 of the time with one token, 0.4 with 8, and 0.6 with 32.

Whether that is so depends on the processor, on the library that is preloaded, and on how many threads the usual product
has. So some of the model's own weights, of each shape, are multiplied both ways when it has been loaded.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.column_major import DIRECT
from runner.engine.direct import DirectEmbedding, DirectLinear, plain_layers
from runner.engine.weight_blocks import multiply

SWITCH: Final = "MLX_RUN_TILES"
"""Environment variable that turns them off, with 0."""

_LINES: Final = (128, 64, 32, 16, 8)
"""Outputs of a tile."""

_RESULTS: Final = 256
"""Outputs of a tile times tokens, at most: beyond them OpenBLAS copies where one of both has to be transposed."""

_TOKENS: Final = (1, 2, 4, 8, 16, 32)
"""That both ways are tried with. Beyond the last, even where it is faster it is not by much."""

_GAIN: Final = 1.2
"""Times as fast as the usual product that it has to be."""

_TRIED: Final = 4_000_000
"""Numbers of the weight that one of the products to be timed has, about: more than are multiplied as they lie."""

_REPEAT: Final = 4


def lines(outputs: int, inputs: int, tokens: int) -> int:
    """How many outputs a tile has, 0 where there is none that is small and a divisor of `outputs`."""
    most = min(_RESULTS, DIRECT // inputs)
    return next((count for count in _LINES if count * tokens <= most and outputs % count == 0), 0)


class Tiles:
    """A weight [outputs, inputs] for up to `most` tokens."""

    def __init__(self, weight: mx.array, most: int) -> None:
        outputs, self._inputs = weight.shape
        self._lines = [lines(outputs, self._inputs, max(1, tokens)) for tokens in range(most + 1)]
        self._views = {count: _tiles(weight, count) for count in {*self._lines} if count}

    def product(self, x: mx.array) -> mx.array | None:
        """[..., outputs] for x [..., inputs]; None where that is better left to the usual product."""
        tokens = x.size // self._inputs
        if tokens >= len(self._lines) or not (count := self._lines[tokens]):
            return None
        return multiply(x, self._views[count])


def _tiles(weight: mx.array, count: int) -> mx.array:
    """[tiles, inputs, count], as a view."""
    return weight.reshape(-1, count, weight.shape[1]).swapaxes(1, 2)


class _Tiled(nn.Module):  # type: ignore[misc]
    tiles: Tiles
    """No parameter of the layer: they are views of one."""


class _TiledLinear(_Tiled):
    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., inputs]."""
        y = self.tiles.product(x)
        if y is None:
            usual: mx.array = super().__call__(x)
            return usual
        return y + self.bias if "bias" in self else y


class TiledLinear(_TiledLinear, nn.Linear):  # type: ignore[misc]
    """A linear layer with a bias."""


class TiledDirectLinear(_TiledLinear, DirectLinear):
    """One without."""


class TiledEmbedding(_Tiled, DirectEmbedding):
    """An embedding that may be the output head as well."""

    def as_linear(self, x: mx.array) -> mx.array:
        """x is [..., width]."""
        y = self.tiles.product(x)
        return super().as_linear(x) if y is None else y


_KINDS: Final[dict[Any, Any]] = {
    nn.Linear: TiledLinear,
    DirectLinear: TiledDirectLinear,
    DirectEmbedding: TiledEmbedding,
}


def install(model: Any) -> None:
    """On the CPU, have the model's large layers multiplied tile by tile, where that is faster.

    To be called once the weights are there, and before any layer is wrapped.
    """
    if mx.default_device() != mx.Device(mx.cpu) or os.environ.get(SWITCH) == "0":
        return
    shapes: defaultdict[tuple[int, ...], list[Any]] = defaultdict(list)
    for layer in plain_layers(model):
        if type(layer) in _KINDS and _large(layer.weight):
            shapes[layer.weight.shape].append(layer)
    for layers in shapes.values():
        most = most_tokens([layer.weight for layer in layers])
        for layer in layers if most else ():
            object.__setattr__(layer, "tiles", Tiles(layer.weight, most))
            layer.__class__ = _KINDS[type(layer)]


def _large(weight: mx.array) -> bool:
    """Whether tiles of it can be views, and it is too large to be multiplied as it lies."""
    if weight.dtype != mx.float32 or weight.size <= DIRECT or not lines(weight.shape[0], weight.shape[1], 1):
        return False
    # Upstream has some that lie as their transpose: MLX would copy each tile.
    return memoryview(weight).c_contiguous  # type: ignore[arg-type]  # it has a buffer


def most_tokens(weights: Sequence[mx.array], clock: Callable[[], float] = time.perf_counter) -> int:
    """Up to how many tokens tiles of such weights, all [outputs, inputs], are faster, 0 if they never are."""
    outputs, inputs = weights[0].shape
    parts, most = _parts(weights), 0
    for tokens in _TOKENS:
        if not (count := lines(outputs, inputs, tokens)):
            break
        x = mx.zeros((tokens, inputs))
        mx.eval(x)
        # Each of both ways has lines of its own: what the other has just read is in a cache.
        pairs = [_timed(x, next(parts), next(parts), count, clock) for _ in range(_REPEAT)]
        if min(usual for usual, _ in pairs) < _GAIN * min(tiled for _, tiled in pairs):
            break
        most = tokens
    return most


def _parts(weights: Sequence[mx.array]) -> Iterator[mx.array]:
    """Lines of the weights without end, others each time until all have been there: no cache holds them then."""
    outputs, inputs = weights[0].shape
    count = min(outputs, max(_LINES[0], _TRIED // inputs // _LINES[0] * _LINES[0]))
    for number in cycle(range(outputs // count)):
        for weight in weights:
            yield weight[number * count : (number + 1) * count]


def _timed(x: mx.array, one: mx.array, other: mx.array, count: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the usual product with one part of a weight, and of one by tiles with another."""
    products: tuple[Callable[[], mx.array], ...] = (lambda: x @ one.T, lambda: multiply(x, _tiles(other, count)))
    seconds = []
    for product in products:
        began = clock()
        mx.eval(product())
        seconds.append(clock() - began)
    return seconds[0], seconds[1]
