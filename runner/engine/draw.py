"""Drawing tokens: for rows with a temperature, by noise that belongs to the row's seed and the token's position.

The token with the largest sum of its scaled logit and standard Gumbel noise is a draw from the softmax (Gumbel, 1954).
Each token id has its own noise, whatever else may be drawn beside it: so filters that differ by a rounding, or another
batch around the row, do not change what it says. The noise comes from a counter-based generator (Threefry; Salmon et
al., SC 2011), as MLX has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from functools import cache, cached_property
from math import inf, log
from typing import TYPE_CHECKING, Final

import mlx.core as mx

from runner.engine import draw_kernel
from runner.engine.arrays import given, replaced
from runner.engine.candidates import candidates
from runner.engine.filters import Filters, Kept

if TYPE_CHECKING:
    from runner.engine.sampling import Choice, SamplingRow

_64_BITS: Final = (1 << 64) - 1
_PROPOSING: Final = 0x5BD1E995
"""Sets apart the noise of a proposal; any constant does that the other streams do not have."""

_ARRAYS: Final = ("_greedy", "_inverse", "settings", "keys", "unbound")
"""Attributes of a Draw, those of its filters aside."""

_BELOW_ONE: Final = 1 - 2**-24


class Draw:
    """Draws for one composition of the batch."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        settings = [row.sampling for row in rows]
        self._vocabulary = vocabulary
        self._greedy = None
        if any(s.temperature <= 0 for s in settings):
            self._greedy = mx.array([[s.temperature <= 0] for s in settings])
        inverse = [1 / s.temperature if s.temperature > 0 else 0.0 for s in settings]
        self._inverse = mx.array([[[scale or 1.0]] for scale in inverse])
        top_p = [s.top_p for s in settings]
        min_p = [log(s.min_p) if s.min_p > 0 else -inf for s in settings]
        top_k = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in settings]
        self.settings = mx.array([list(row) for row in zip(inverse, top_p, min_p, top_k, strict=True)])
        """[B, 4]: see `runner.engine.draw_kernel`."""
        self.filters = Filters(settings, vocabulary)
        """What rows leave out."""
        self.keys = mx.array([[key_of(row.seed)] for row in rows], dtype=mx.uint32)
        """[B, 1, 2]: of the rows' noise at position 0."""
        words = (vocabulary + 1) // 2
        self._bits = mx.vmap(lambda key: mx.random.split(key, words))
        self._uniform = mx.vmap(lambda key: mx.random.uniform(key=key))
        unbound = [s.temperature > 0 and s.seed is None for s in settings]
        self.unbound = mx.array([[free] for free in unbound]) if any(unbound) else None
        """[B, 1]: rows without a seed, whose noise is nobody's business; None where there are none."""
        self.bound = any(s.temperature > 0 and s.seed is not None for s in settings)
        """Whether a row draws by its seed."""

    @property
    def form(self) -> Hashable:
        """What decides, beside `arrays`, what is drawn."""
        missing = tuple(getattr(self, name) is None for name in _ARRAYS)
        return self._vocabulary, missing, self.filters.form, self.bound

    @property
    def arrays(self) -> list[mx.array]:
        """What its draws depend on."""
        return given(self, _ARRAYS) + self.filters.arrays

    def having(self, arrays: Sequence[mx.array]) -> Draw:
        """One of the same form with such `arrays`."""
        rest = iter(arrays)
        other = replaced(self, _ARRAYS, rest)
        other.filters = self.filters.having(list(rest))
        return other

    def weights(self, logits: mx.array) -> mx.array:
        """[B, T, V]: the logarithms, up to a constant of the row, of what is drawn from at logits [B, T, V]."""
        return self._scaled(logits, Kept(None) if self.filters.none else self.filters(logits))

    @cached_property
    def proposing(self) -> Draw:
        """The same, but that rows which are not bound to their seed draw with noise that nothing else uses."""
        if self.unbound is None:
            return self
        other = copy(self)
        streams = mx.where(self.unbound, mx.array(_PROPOSING, dtype=mx.uint32), mx.array(0, dtype=mx.uint32))
        other.keys = self.keys_of(streams)
        return other

    def __call__(self, choice: Choice, position: mx.array) -> mx.array:
        """[B, T]: a draw by the weights of `choice` for rows with a temperature, its tokens for the others.

        `position` [B, 1] is the index of the first of T.
        """
        logits = choice.logits
        if draw_kernel.applies(logits):
            return draw_kernel.draw_tokens(logits, self.settings, self.keys, position)
        bits = self._random(position, logits.shape[1], 0)
        few = candidates(logits, self.filters, self._greedy)
        if few is not None:
            weights = self._scaled(few.logits, few.kept)
            drawn = few.ids(mx.argmax(_fused(_perturbed)(weights, few.take(bits)), axis=-1))
        else:
            assert choice.weights is not None
            drawn = mx.argmax(_fused(_perturbed)(choice.weights, bits), axis=-1)
        return drawn if self._greedy is None else mx.where(self._greedy, choice.tokens, drawn)

    def _scaled(self, logits: mx.array, kept: Kept) -> mx.array:
        if kept.least is None:
            return _fused(_scaled)(logits, self._inverse)
        if kept.surplus is None:
            return _fused(_kept_scaled)(logits, kept.least, self._inverse)
        return kept.apply(logits.astype(mx.float32)) * self._inverse

    def gumbel(self, position: mx.array, count: int, stream: mx.array | int) -> mx.array:
        """[B, count, V]: standard Gumbel noise for the positions from `position` [B, 1] on."""
        return _fused(_gumbel)(self._random(position, count, stream))

    def uniform(self, position: mx.array, count: int, stream: mx.array | int) -> mx.array:
        """[B, count]: uniform in [0, 1) for the positions from `position` [B, 1] on."""
        keys = self.keys_at(position, count, stream)
        return self._uniform(keys.reshape(-1, 2)).reshape(keys.shape[:2])

    def _random(self, position: mx.array, count: int, stream: mx.array | int) -> mx.array:
        """[B, count, V] of uint32: every bit of them random."""
        keys = self.keys_at(position, count, stream)
        bits = self._bits(keys.reshape(-1, 2)).reshape(*keys.shape[:2], -1)
        return bits if bits.shape[-1] == self._vocabulary else bits[..., : self._vocabulary]

    def keys_at(self, position: mx.array, count: int, stream: mx.array | int) -> mx.array:
        """[B, count, 2]. Streams of one row and position have nothing in common."""
        if count > 1:
            position = position + mx.arange(count, dtype=mx.uint32)
        return self.keys_of(stream) + position[..., None] * mx.array([0, 1], dtype=mx.uint32)

    def keys_of(self, stream: mx.array | int) -> mx.array:
        """[B, 1, 2]: of position 0 in a stream, which is a number or [B, 1]."""
        if isinstance(stream, int) and stream == 0:
            return self.keys
        first = mx.array(stream, dtype=mx.uint32)
        first = first[..., None] if first.ndim else first
        return self.keys ^ (first * mx.array([1, 0], dtype=mx.uint32))


def key_of(seed: int) -> tuple[int, int]:
    """A counter-based generator's key: 64 well-mixed bits of the seed. The token's position is added to the second.

    The mixing is SplitMix64's (Steele, Lea and Flood, OOPSLA 2014).
    """
    z = (seed + 0x9E3779B97F4A7C15) & _64_BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64_BITS
    z ^= z >> 31
    return z >> 32, z & 0xFFFFFFFF


# Each of these is one launch where it is compiled, and up to seven where it is not.


def _scaled(logits: mx.array, inverse: mx.array) -> mx.array:
    return logits.astype(mx.float32) * inverse


def _kept_scaled(logits: mx.array, least: mx.array, inverse: mx.array) -> mx.array:
    return mx.where(logits < least, -float("inf"), logits.astype(mx.float32) * inverse)


def _gumbel(bits: mx.array) -> mx.array:
    uniform = mx.minimum(bits.astype(mx.float32) * 2.0**-32, _BELOW_ONE)
    return -mx.log(-mx.log(uniform))


def _perturbed(weights: mx.array, bits: mx.array) -> mx.array:
    uniform = mx.minimum(bits.astype(mx.float32) * 2.0**-32, _BELOW_ONE)
    return weights - mx.log(-mx.log(uniform))


@cache
def _fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compiled for a GPU. On the CPU compiling calls a C++ compiler, which takes seconds."""
    if mx.default_device() == mx.Device(mx.cpu):
        return function
    compiled: Callable[..., mx.array] = mx.compile(function)
    return compiled
