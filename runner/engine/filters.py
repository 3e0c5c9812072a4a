"""top_p, min_p and top_k, each row with its own.

All three keep the most likely tokens down to some logit, so what they come to is one threshold a row. One ascending
sort serves top_p and top_k; where neither is asked for there is none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine.arrays import given, replaced
from runner.protocol import Sampling

NONE = -float("inf")

_ARRAYS: Final = ("top_p", "min_p", "top_k")
"""Attributes of Filters."""


class Kept(msgspec.Struct, frozen=True):
    """Which tokens may be drawn: those whose logit is `least` [..., 1] or more, without `surplus` [..., V].

    None for either says that it leaves nothing out.
    """

    least: mx.array | None
    surplus: mx.array | None = None

    def apply(self, logits: mx.array) -> mx.array:
        """Logits [..., V], -inf where a token is left out."""
        if self.least is not None:
            logits = mx.where(logits < self.least, NONE, logits)
        return logits if self.surplus is None else mx.where(self.surplus, NONE, logits)


class Filters:
    """The filters of one composition of the batch. Each attribute is [B, 1, 1], or None where no row asks for it."""

    def __init__(self, settings: Sequence[Sampling], vocabulary: int) -> None:
        self.top_p = self.min_p = self.top_k = None
        self._vocabulary = vocabulary
        drawing = [s for s in settings if s.temperature > 0]
        if any(s.top_p < 1 for s in drawing):
            self.top_p = mx.array([[[s.top_p]] for s in settings])
        self._some_keep_all = any(s.top_p >= 1 for s in drawing)
        if any(s.min_p > 0 for s in drawing):
            self.min_p = mx.log(mx.array([[[s.min_p]] for s in settings]))
        self.some_unfiltered = any(s.top_p >= 1 and s.min_p <= 0 and not 0 < s.top_k < vocabulary for s in drawing)
        """Whether some row draws from all tokens."""
        if any(0 < s.top_k < vocabulary for s in drawing):
            self.top_k = mx.array([[[s.top_k if 0 < s.top_k < vocabulary else vocabulary]] for s in settings])

    @property
    def form(self) -> Hashable:
        """What decides, beside `arrays`, what they keep."""
        missing = tuple(getattr(self, name) is None for name in _ARRAYS)
        return self._vocabulary, missing, self._some_keep_all, self.some_unfiltered

    @property
    def arrays(self) -> list[mx.array]:
        """The rows' settings."""
        return given(self, _ARRAYS)

    def having(self, arrays: Sequence[mx.array]) -> Filters:
        """Filters of the same form with such `arrays`."""
        return replaced(self, _ARRAYS, iter(arrays))

    @property
    def none(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_p is None and self.min_p is None and self.top_k is None

    def __call__(self, logits: mx.array, normaliser: mx.array | None = None) -> Kept:
        """For logits [B, T, V]; with the `normaliser` [B, T, 1] of all, for the largest of them, in order of ids."""
        least: list[mx.array] = []
        surplus = most = None
        if self.top_p is not None or self.top_k is not None:
            ordered = mx.sort(logits, axis=-1)
            most = ordered[..., -1:]
            if self.top_p is not None:
                found = top_p_threshold(ordered, self.top_p, normaliser)
                least.append(mx.where(self.top_p >= 1, NONE, found) if self._some_keep_all else found)
            if self.top_k is not None:
                last, surplus = top_k_threshold(logits, ordered, self.top_k)
                least.append(last)
        if self.min_p is not None:
            most = mx.max(logits, axis=-1, keepdims=True) if most is None else most
            # log p < log min_p + log p_max, in which the normaliser cancels
            least.append(most.astype(mx.float32) + self.min_p)
        if not least:
            return Kept(None)
        together = least[0]
        for other in least[1:]:
            together = mx.maximum(together, other)
        return Kept(together, surplus)


def top_p_threshold(ordered: mx.array, top_p: mx.array, normaliser: mx.array | None = None) -> mx.array:
    """[..., 1]: the least logit of the smallest set of tokens whose probability reaches `top_p` [..., 1].

    `ordered` [..., V] are logits in ascending order; with a `normaliser` [..., 1] they are the largest only, and the
    least of them is returned if they do not reach it. Ties with the least stay in, as in mlx-lm.
    """
    # The probability of a token and all that are less likely: summed from the small end, where float32 is most exact.
    if normaliser is None:
        upto = mx.cumsum(mx.softmax(ordered.astype(mx.float32), axis=-1, precise=True), axis=-1)
    else:
        probabilities = mx.exp(ordered.astype(mx.float32) - normaliser)
        upto = mx.cumsum(probabilities, axis=-1) + (1 - probabilities.sum(axis=-1, keepdims=True))
    left_out = (upto <= 1 - top_p).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(ordered, mx.minimum(left_out, ordered.shape[-1] - 1), axis=-1)


def top_k_threshold(logits: mx.array, ordered: mx.array, top_k: mx.array) -> tuple[mx.array, mx.array]:
    """The `top_k`-th largest [..., 1] of logits [..., V], and which of its equals [..., V] are too many.

    `ordered` is `logits` in ascending order. Of equals the first stay in, so that exactly k do.
    """
    at = mx.maximum(ordered.shape[-1] - top_k, 0)
    least = mx.take_along_axis(ordered, mx.broadcast_to(at, (*ordered.shape[:-1], 1)), axis=-1)
    equal = logits == least
    room = top_k - (logits > least).sum(axis=-1, keepdims=True)
    return least, equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) > room)
