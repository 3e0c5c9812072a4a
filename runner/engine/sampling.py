"""The next token of every row at once.

One sampler serves one composition of the batch; it is built anew, from what the host knows of the rows, when rows join
or leave. A step works on whole arrays, and computes only what some row asked for. A greedy row gets the argmax of its
logits whatever its neighbours do, and a seeded row gets the same tokens in any composition: its noise comes from its
own key and the token's position alone.

Order and meaning, as in mlx-lm: what a grammar does not allow is left out; logit bias; repetition, presence and
frequency penalty; log-probabilities are taken here; then top_p, min_p and top_k, all of them on the distribution before
temperature; then temperature and a draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import msgspec

from runner.engine.draw import Draw
from runner.engine.grammar.masks import Mask
from runner.engine.penalties import Histories, History, Penalties
from runner.protocol import Sampling


class SamplingRow(msgspec.Struct, frozen=True):
    """What the sampler needs to know of a row.

    `generated` are the tokens of the model that the host knows. If one more is `unread`, still on the device, the row
    is fed that next; otherwise the last of `prompt` and `generated`.
    """

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    generated: Sequence[int]
    unread: bool

    @property
    def position(self) -> int:
        """Index, among the model's own, of the token to be sampled next."""
        return len(self.generated) + self.unread

    def before(self, count: int) -> list[int]:
        """The last `count` tokens before the one that is fed next, or as many as there are."""
        if not self.unread and not self.generated:
            return list(self.prompt[max(0, len(self.prompt) - 1 - count) : -1])
        known = self.generated_before()
        known = known[max(0, len(known) - count) :]
        missing = count - len(known)
        return list(self.prompt[max(0, len(self.prompt) - missing) :] if missing else ()) + known

    def generated_before(self) -> list[int]:
        """The model's own tokens before the one that is fed next."""
        return list(self.generated) if self.unread else list(self.generated[:-1])


class Logprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities of the rows `rows`, as asked: [R, T] of the chosen, [R, T, K] of the most likely."""

    rows: list[int]
    chosen: mx.array
    top_tokens: mx.array | None
    top: mx.array | None

    def arrays(self) -> list[mx.array]:
        """To be evaluated with the step."""
        return [array for array in (self.chosen, self.top_tokens, self.top) if array is not None]


class State(msgspec.Struct, frozen=True):
    """What changes from step to step: `position` [B, 1] of the token chosen next, and what rows have said."""

    position: mx.array | None
    history: History | None


class Choice(msgspec.Struct):
    """A sampler's view of T positions of each row.

    `tokens` [B, T] are chosen; `logits` [B, T, V] are masked, biased and penalised.
    """

    tokens: mx.array
    logits: mx.array
    state: State
    histories: Histories | None
    draw: Draw | None
    _weights: mx.array | None = None

    @property
    def weights(self) -> mx.array | None:
        """[B, T, V]: the logarithms, up to a constant of the row, of what is drawn from; None where no row draws.

        Made when it is first asked for: there are shorter ways to a token.
        """
        if self._weights is None and self.draw is not None:
            self._weights = self.draw.weights(self.logits)
        return self._weights

    def after(self, last: mx.array | None = None) -> State:
        """The state once the rows have taken the fed tokens up to index `last` [B], included; all of them for None."""
        position = self.state.position
        if position is not None:
            steps = _steps(self.tokens.shape[1]) if last is None else (last[:, None] + 1).astype(position.dtype)
            position = position + steps
        return State(position, None if self.histories is None else self.histories.after(last))


@cache
def _steps(count: int) -> mx.array:
    # Kept: a device waits tens of microseconds for a number that the host has just written.
    return mx.array(count, dtype=mx.uint32)


class Sampler:
    """Chooses tokens for one composition of the batch."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        """`vocabulary` is the width of the logits."""
        settings = [row.sampling for row in rows]
        self._penalties = Penalties.of(rows, vocabulary)
        self._bias = _Bias.of(settings)
        self._logprob_rows = [i for i, s in enumerate(settings) if s.logprobs is not None]
        self._logprob_tops = max((s.logprobs or 0 for s in settings), default=0)
        self.draw: Draw | None = None
        position = None
        if any(s.temperature > 0 for s in settings):
            self.draw = Draw(rows, vocabulary)
            position = mx.array([[row.position] for row in rows], dtype=mx.uint32)
        self.state = State(position, None if self._penalties is None else self._penalties.start)

    def __call__(self, logits: mx.array, fed: mx.array, mask: Mask | None = None) -> tuple[mx.array, Logprobs | None]:
        """Tokens [B] for logits [B, V], after the tokens `fed` [B]; and the log-probabilities that rows asked for.

        They are part of the rows from here on.
        """
        choice = self.choose(logits[:, None], fed[:, None], self.state, mask)
        self.state = choice.after()
        return choice.tokens[:, 0], self.logprobs(choice.logits, choice.tokens)

    def choose(
        self,
        logits: mx.array,
        fed: mx.array,
        state: State,
        mask: Mask | None = None,
        *,
        verifying: bool = False,
    ) -> Choice:
        """Tokens for logits [B, T, V], each after the tokens `fed` [B, T] up to its own, on top of `state`.

        With `verifying`, tokens of rows that are not bound to their seed mean nothing: `weights` are what is wanted of
        them.
        """
        if mask is not None:
            logits = mask.apply(logits)
        if self._bias is not None:
            logits = self._bias(logits)
        histories = None
        if self._penalties is not None and state.history is not None:
            logits, histories = self._penalties(logits, fed, state.history)
        choice = Choice(mx.argmax(logits, axis=-1), logits, state, histories, self.draw)
        if self.draw is not None and state.position is not None and (self.draw.bound or not verifying):
            choice.tokens = self.draw(choice, state.position)
        return choice

    @property
    def unbound(self) -> bool:
        """Whether a row draws without a seed."""
        return self.draw is not None and self.draw.unbound is not None

    @cached_property
    def proposing(self) -> Sampler:
        """One that draws with noise that this one does not use, for rows that are not bound to their seed."""
        other = copy(self)
        other.draw = None if self.draw is None else self.draw.proposing
        return other

    @property
    def form(self) -> Hashable | None:
        """What decides, beside `arrays`, how it chooses; None where more does, such as what rows have said."""
        if self._penalties is not None or self._bias is not None:
            return None
        return () if self.draw is None else self.draw.form

    @property
    def arrays(self) -> list[mx.array]:
        """What it chooses by, beside logits and positions, if it has a `form`."""
        return [] if self.draw is None else self.draw.arrays

    def having(self, arrays: Sequence[mx.array]) -> Sampler:
        """One of the same form with such `arrays`."""
        other = copy(self)
        other.draw = None if self.draw is None else self.draw.having(arrays)
        return other

    def logprobs(self, logits: mx.array, tokens: mx.array) -> Logprobs | None:
        """Of `tokens` [B, T] and the most likely, by logits [B, T, V]; None when no row asked."""
        if not self._logprob_rows:
            return None
        if len(self._logprob_rows) < logits.shape[0]:
            rows = mx.array(self._logprob_rows)
            logits, tokens = logits[rows], tokens[rows]
        logits = logits.astype(mx.float32)
        normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = (mx.take_along_axis(logits, tokens[..., None], axis=-1) - normaliser)[..., 0]
        if not self._logprob_tops:
            return Logprobs(self._logprob_rows, chosen, None, None)
        best, values = most_likely(logits, self._logprob_tops)
        return Logprobs(self._logprob_rows, chosen, best, values - normaliser)


class _Bias:
    """Every row's `logit_bias`: a few entries, written into the logits."""

    def __init__(self, entries: Sequence[tuple[int, int, float]]) -> None:
        """`entries` are (row, token, value)."""
        rows, tokens, values = (mx.array(column) for column in zip(*entries, strict=True))
        self._rows, self._tokens, self._values = rows[:, None], tokens[:, None], values[:, None]

    @classmethod
    def of(cls, settings: Sequence[Sampling]) -> _Bias | None:
        """None when no row has one."""
        entries = [(i, token, bias) for i, s in enumerate(settings) for token, bias in s.logit_bias.items()]
        return cls(entries) if entries else None

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [B, T, V], biased, in float32."""
        target: Any = logits.astype(mx.float32)
        biased: mx.array = target.at[self._rows, mx.arange(logits.shape[1])[None], self._tokens].add(self._values)
        return biased


def repeated_last(array: mx.array, rows: int) -> mx.array:
    """[rows, …] of [B, …], at most as many: its last row stands in for those that are not there."""
    if (more := rows - array.shape[0]) <= 0:
        return array
    return mx.concatenate([array, mx.broadcast_to(array[-1:], (more, *array.shape[1:]))])


def most_likely(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Indices [..., count] of the largest of [..., V], largest first, and their values.

    The largest of all are among the groups with the largest maxima: of 128,000 values, a few thousand are sorted.
    """
    size = values.shape[-1]
    group = next((width for width in (64, 32, 16) if size % width == 0 and count * width * 4 <= size), 1)
    if group > 1:
        grouped = values.reshape(*values.shape[:-1], size // group, group)
        groups = _largest(mx.max(grouped, axis=-1), count)
        among = mx.take_along_axis(grouped, groups[..., None], axis=-2)
        found = _largest(among.reshape(*values.shape[:-1], count * group), count)
        found = mx.take_along_axis(groups, found // group, axis=-1) * group + found % group
    else:
        found = _largest(values, min(count, size))
    best = mx.take_along_axis(values, found, axis=-1)
    order = mx.argsort(-best, axis=-1)
    return mx.take_along_axis(found, order, axis=-1), mx.take_along_axis(best, order, axis=-1)


def _largest(values: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest, in any order."""
    size = values.shape[-1]
    if count >= size:
        return mx.broadcast_to(mx.arange(size, dtype=mx.uint32), values.shape)
    return mx.argpartition(values, kth=size - count, axis=-1)[..., size - count :]
