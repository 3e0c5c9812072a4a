"""The next token of every row at once.

One sampler serves one composition of the batch; it is built anew, from what the host knows of the rows, when rows join
or leave. A step works on whole arrays, and computes only what some row asked for. A greedy row gets the argmax of its
logits whatever its neighbours do, and a seeded row gets the same tokens in any composition: its noise comes from its
own key and the token's position alone.

Order and meaning, as in mlx-lm: logit bias; repetition, presence and frequency penalty; log-probabilities are taken
here; then top_p, min_p and top_k, all of them on the distribution before temperature; then temperature and a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from runner.engine.penalties import Penalties
from runner.protocol import Sampling

NONE: Final = -float("inf")
_64_BITS: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of a row.

    `generated` are the tokens of the model that the host knows. A row that has `started` is fed one more of them next,
    still on the device; one that has not is fed the last of its `prompt`.
    """

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    generated: Sequence[int]
    started: bool

    @property
    def position(self) -> int:
        """Index, among the model's own, of the token to be sampled next."""
        return len(self.generated) + self.started

    def before(self, count: int) -> list[int]:
        """The last `count` tokens before the one that is fed next, or as many as there are."""
        if not self.started:
            return list(self.prompt[max(0, len(self.prompt) - 1 - count) : -1])
        known = list(self.generated[max(0, len(self.generated) - count) :])
        missing = count - len(known)
        return list(self.prompt[max(0, len(self.prompt) - missing) :] if missing else ()) + known


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities of the rows `rows`, as asked: [R] of the chosen, [R, K] of the most likely."""

    rows: list[int]
    chosen: mx.array
    top_tokens: mx.array | None
    top: mx.array | None

    def arrays(self) -> list[mx.array]:
        """To be evaluated with the step."""
        return [array for array in (self.chosen, self.top_tokens, self.top) if array is not None]


class Sampler:
    """Chooses tokens for one composition of the batch."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        """`vocabulary` is the width of the logits."""
        settings = [row.sampling for row in rows]
        self._penalties = Penalties.of(rows, vocabulary)
        self._bias = _dense_bias(settings, vocabulary)
        self._logprob_rows = [i for i, s in enumerate(settings) if s.logprobs is not None]
        self._logprob_tops = max((s.logprobs or 0 for s in settings), default=0)
        self._draw: _Draw | None = None
        if any(s.temperature > 0 for s in settings):
            self._draw = _Draw(rows, vocabulary)

    def __call__(self, logits: mx.array, fed: mx.array) -> tuple[mx.array, Logprobs | None]:
        """Tokens [B] for logits [B, V], after the tokens `fed` [B]; and the log-probabilities that rows asked for."""
        if self._bias is not None:
            logits = logits + self._bias
        if self._penalties is not None:
            logits = self._penalties(logits, fed)
        tokens = mx.argmax(logits, axis=-1)
        if self._draw is not None:
            tokens = self._draw(logits, tokens)
        return tokens, self._logprobs(logits, tokens) if self._logprob_rows else None

    def _logprobs(self, logits: mx.array, tokens: mx.array) -> Logprobs:
        rows = mx.array(self._logprob_rows)
        chosen_logits = logits[rows].astype(mx.float32)
        logprobs = chosen_logits - mx.logsumexp(chosen_logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, tokens[rows][:, None], axis=-1)[:, 0]
        if not self._logprob_tops:
            return Logprobs(self._logprob_rows, chosen, None, None)
        best = most_likely(logprobs, self._logprob_tops)
        return Logprobs(self._logprob_rows, chosen, best, mx.take_along_axis(logprobs, best, axis=-1))


class _Draw:
    """Draws for the rows with a temperature: Gumbel noise on the filtered, scaled logits, then argmax."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        settings = [row.sampling for row in rows]
        self._greedy = None
        if any(s.temperature <= 0 for s in settings):
            self._greedy = mx.array([s.temperature <= 0 for s in settings])
        self._inverse = mx.array([[1 / s.temperature if s.temperature > 0 else 1.0] for s in settings])
        self._filters = _Filters(settings, vocabulary)
        keys = [key_of(row.seed) for row in rows]
        self._key_high = mx.array([high for high, _ in keys], dtype=mx.uint32)
        self._key_low = mx.array([low for _, low in keys], dtype=mx.uint32)
        self._position = mx.array([row.position for row in rows], dtype=mx.uint32)
        self._noise = mx.vmap(lambda key: mx.random.gumbel((vocabulary,), key=key))

    def __call__(self, logits: mx.array, greedy: mx.array) -> mx.array:
        keys = mx.stack([self._key_high, self._key_low + self._position], axis=-1)
        self._position = self._position + 1
        scaled = self._filters(logits.astype(mx.float32)) * self._inverse
        drawn = mx.argmax(scaled + self._noise(keys), axis=-1)
        return drawn if self._greedy is None else mx.where(self._greedy, greedy, drawn)


class _Filters:
    """top_p, min_p and top_k, each row with its own, neutral values included."""

    def __init__(self, settings: Sequence[Sampling], vocabulary: int) -> None:
        self._top_p = self._min_p = self._top_k = None
        self._most = 0
        if any(s.top_p < 1 for s in settings):
            self._top_p = mx.array([[s.top_p] for s in settings])
        if any(s.min_p > 0 for s in settings):
            self._min_p = mx.log(mx.array([[s.min_p] for s in settings]))
        limits = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in settings]
        limited = [limit for limit in limits if limit < vocabulary]
        if limited:
            self._most = max(limited)
            self._top_k = mx.array([[limit] for limit in limits])

    def __call__(self, logits: mx.array) -> mx.array:
        kept = logits
        if self._top_p is not None:
            kept = mx.where(logits < top_p_threshold(logits, self._top_p), NONE, kept)
        if self._min_p is not None:
            # log p < log min_p + log p_max, in which the normaliser cancels
            kept = mx.where(logits < mx.max(logits, axis=-1, keepdims=True) + self._min_p, NONE, kept)
        if self._top_k is not None:
            kept = mx.where(among_top_k(logits, self._top_k, self._most), kept, NONE)
        return kept


def among_top_k(logits: mx.array, top_k: mx.array, most: int) -> mx.array:
    """[B, V]: whether a logit is one of its row's `top_k` [B, 1] largest; all are where that is V or more.

    Exactly k of a row are, ties by position. `most` is the largest `top_k` below V.
    """
    chosen = mx.arange(most)[None] < top_k
    mask = mx.broadcast_to(top_k >= logits.shape[-1], logits.shape)
    return mx.put_along_axis(mask, most_likely(logits, most), chosen, axis=-1)


def top_p_threshold(logits: mx.array, top_p: mx.array) -> mx.array:
    """[B, 1]: the least logit of the smallest set of tokens whose probability reaches `top_p` [B, 1].

    -inf for rows with top_p ≥ 1. Ties with the least stay in, as in mlx-lm.
    """
    ordered = -mx.sort(-logits, axis=-1)
    probabilities = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1, inclusive=False)
    kept = mx.maximum((before < top_p).sum(axis=-1, keepdims=True), 1)
    return mx.where(top_p >= 1, NONE, mx.take_along_axis(ordered, kept - 1, axis=-1))


def most_likely(values: mx.array, count: int) -> mx.array:
    """[B, count]: indices of the largest of [B, V], largest first."""
    if count < values.shape[-1]:
        found = mx.argpartition(-values, kth=count - 1, axis=-1)[:, :count]
    else:
        found = mx.broadcast_to(mx.arange(values.shape[-1])[None], values.shape)
    order = mx.argsort(-mx.take_along_axis(values, found, axis=-1), axis=-1)
    return mx.take_along_axis(found, order, axis=-1)


def key_of(seed: int) -> tuple[int, int]:
    """A counter-based generator's key: 64 well-mixed bits of the seed. The token's position is added to the second.

    The mixing is SplitMix64's (Steele, Lea and Flood, OOPSLA 2014).
    """
    z = (seed + 0x9E3779B97F4A7C15) & _64_BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64_BITS
    z ^= z >> 31
    return z >> 32, z & 0xFFFFFFFF


def _dense_bias(settings: Sequence[Sampling], vocabulary: int) -> mx.array | None:
    entries = [(i, token, bias) for i, s in enumerate(settings) for token, bias in s.logit_bias.items()]
    if not entries:
        return None
    rows, tokens, values = (mx.array(column) for column in zip(*entries, strict=True))
    zeros: Any = mx.zeros((len(settings), vocabulary))
    dense: mx.array = zeros.at[rows, tokens].add(values)
    return dense
