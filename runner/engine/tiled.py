"""Products of few tokens with large weights on the CPU, a tile of the weight at a time.

BLAS copies what it multiplies into an order of its own first. With few tokens that is what a product takes: the weight
is read, written, and read again. OpenBLAS multiplies small matrices as they lie (`column_major.py` says which), so here
a weight is a batch of small ones, which are views of it, and the product one operation as before. For weights of 2,048
inputs and 8,192 outputs it takes 0.29 of the time with one token, 0.4 with 8, and 0.6 with 32.

Whether that is so depends on the processor, on the library that is preloaded, and on how many threads the usual product
has. So some of the model's own weights are multiplied both ways when it has been loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from runner.engine.column_major import DIRECT
from runner.engine.direct import DirectEmbedding, DirectLinear, plain_layers

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

_TRIED: Final = 1_000_000
"""Numbers of the weight that one of the products to be timed has, about."""

_REPEAT: Final = 5


def lines(outputs: int, inputs: int, tokens: int) -> int:
    """How many outputs a tile has, 0 where there is none that is small and a divisor of `outputs`."""
    most = min(_RESULTS, DIRECT // inputs)
    return next((count for count in _LINES if count * tokens <= most and outputs % count == 0), 0)


class Tiles:
    """A weight [outputs, inputs] for up to `most` tokens."""

    def __init__(self, weight: mx.array, most: int) -> None:
        self._outputs, self._inputs = weight.shape
        self._lines = [lines(self._outputs, self._inputs, max(1, tokens)) for tokens in range(most + 1)]
        self._views = {
            count: weight.reshape(-1, count, self._inputs).swapaxes(1, 2) for count in {*self._lines} if count
        }

    def product(self, x: mx.array) -> mx.array | None:
        """[..., outputs] for x [..., inputs]; None where that is better left to the usual product."""
        tokens = x.size // self._inputs
        if tokens >= len(self._lines) or not (count := self._lines[tokens]):
            return None
        # [tiles, tokens, lines]
        y = x.reshape(1, tokens, self._inputs) @ self._views[count]
        return (y if tokens == 1 else y.swapaxes(0, 1)).reshape(*x.shape[:-1], self._outputs)


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
    layers = [layer for layer in plain_layers(model) if type(layer) in _KINDS and _large(layer.weight)]
    if not layers or not (most := most_tokens([layer.weight for layer in layers])):
        return
    for layer in layers:
        object.__setattr__(layer, "tiles", Tiles(layer.weight, most))
        layer.__class__ = _KINDS[type(layer)]


def _large(weight: mx.array) -> bool:
    return weight.dtype == mx.float32 and weight.size > DIRECT and lines(weight.shape[0], weight.shape[1], 1) > 0


def most_tokens(weights: Sequence[mx.array], clock: Callable[[], float] = time.perf_counter) -> int:
    """Up to how many tokens tiles of such weights [outputs, inputs] are faster, 0 if they never are."""
    most = 0
    for tokens in _TOKENS:
        pairs = [
            _timed(weight, tokens, clock)
            for weight in _some(weights)
            if lines(weight.shape[0], weight.shape[1], tokens)
        ]
        if not pairs or min(usual for usual, _ in pairs) < _GAIN * min(tiled for _, tiled in pairs):
            break
        most = tokens
    return most


def _some(weights: Sequence[mx.array]) -> Iterator[mx.array]:
    """Lines of the largest weights, which no cache holds: others each time."""
    largest = max(weight.size for weight in weights)
    same = [weight for weight in weights if weight.size == largest]
    count = max(_LINES[0], _TRIED // same[0].shape[1] // _LINES[0] * _LINES[0])
    for number in range(_REPEAT):
        weight = same[number % len(same)]
        begin = number // len(same) * count
        yield weight[begin : begin + count] if begin + count <= weight.shape[0] else weight[-count:]


def _timed(weight: mx.array, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the usual product, and of one by tiles."""
    x, tiles = mx.zeros((tokens, weight.shape[1])), Tiles(weight, tokens)
    products: tuple[Callable[[], mx.array | None], ...] = (lambda: x @ weight.T, lambda: tiles.product(x))
    mx.eval(x)
    times = [clock()]
    for product in products:
        mx.eval(product())
        times.append(clock())
    return times[1] - times[0], times[2] - times[1]
