"""Repetition, presence and frequency penalties for all rows at once.

`repetition_penalty` divides a positive logit, and multiplies a negative one, of every token among the last
`repetition_context_size` of prompt and answer (Keskar et al., arXiv:1909.05858, as in mlx-lm). `presence_penalty` is
subtracted once from each token the model has generated, `frequency_penalty` as often as it has (as OpenAI documents
them; mlx-lm counts the last 20 tokens, prompt included).

What a row has said is kept on the device and grows by the tokens fed in each step: the step before may still be
running, so the host does not know them yet. A step that feeds several tokens penalises after each of them, and goes on
from as many as each row keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import msgspec

if TYPE_CHECKING:
    from runner.engine.sampling import SamplingRow


class History(msgspec.Struct, frozen=True):
    """What rows have said before the tokens that are fed next; None for what no row needs.

    `recent` [B, W] are the last tokens, right-justified, -1 where there is none. `counts` [B, V] is how often each
    token was generated. `own` [B, 1] says whether the token fed next is the model's, None where all are: a row's first
    step feeds it the last token of its prompt.
    """

    recent: mx.array | None
    counts: mx.array | None
    own: mx.array | None


class Histories(msgspec.Struct, frozen=True):
    """The histories after each of T fed tokens: `joined` [B, W + T] and `counts` [B, T, V], as in History."""

    joined: mx.array | None
    counts: mx.array | None
    fed: int

    def after(self, last: mx.array | None = None) -> History:
        """The history after the fed token of index `last` [B], and those before it; after all of them for None."""
        recent, counts = None, None
        if self.joined is not None:
            width = self.joined.shape[1] - self.fed
            if last is None:
                recent = self.joined[:, self.fed :]
            else:
                recent = mx.take_along_axis(self.joined, mx.arange(1, width + 1) + last[:, None], axis=1)
        if self.counts is not None:
            index = self.fed - 1 if last is None else last[:, None, None]
            if isinstance(index, int):
                counts = self.counts[:, index]
            else:
                counts = mx.take_along_axis(self.counts, index, axis=1)[:, 0]
        return History(recent, counts, None)


class Penalties:
    """The penalties of one composition of the batch."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        settings = [row.sampling for row in rows]
        self._vocabulary = vocabulary
        recent = counts = own = None
        sizes = [s.repetition_context_size if s.repetition_penalty != 1 else 0 for s in settings]
        self._width = max(sizes)
        if self._width:
            penalties = [s.repetition_penalty if size else 1.0 for s, size in zip(settings, sizes, strict=True)]
            self._repetition = mx.array([[[penalty]] for penalty in penalties])
            self._in_window = mx.arange(self._width) >= self._width - mx.array([[[size]] for size in sizes])
            recent = _right_justified([row.before(self._width) for row in rows], self._width)
        if any(s.presence_penalty or s.frequency_penalty for s in settings):
            self._presence = mx.array([[[s.presence_penalty]] for s in settings])
            self._frequency = mx.array([[[s.frequency_penalty]] for s in settings])
            generated = [row.generated_before() for row in rows]
            counts = self._counts(_right_justified(generated, max(map(len, generated))))
            own = mx.array([[row.unread or bool(row.generated)] for row in rows])
        self.start = History(recent, counts, own)

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], vocabulary: int) -> Penalties | None:
        """The penalties of `rows`, None when no row has one."""
        for row in rows:
            s = row.sampling
            if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty:
                return cls(rows, vocabulary)
        return None

    def __call__(self, logits: mx.array, fed: mx.array, history: History) -> tuple[mx.array, Histories]:
        """Logits [B, T, V] penalised, each after the tokens `fed` [B, T] up to its own; and what was said by then."""
        fed = fed.astype(mx.int32)
        joined = counts = None
        logits = logits.astype(mx.float32)
        if history.recent is not None:
            joined = mx.concatenate([history.recent, fed], axis=1)
            logits = self._repeated(logits, self._windows(joined, fed.shape[1]), fed)
        if history.counts is not None:
            counts = self._counted(history.counts, history.own, fed)
            logits = logits - self._presence * (counts > 0) - self._frequency * counts
        return logits, Histories(joined, counts, fed.shape[1])

    def _repeated(self, logits: mx.array, windows: mx.array, fed: mx.array) -> mx.array:
        """Logits [B, T, V] with those of the tokens in `windows` [B, T, W] penalised: nothing else is touched."""
        # What is not in a row's own window is replaced by what surely is; writing one value twice does no harm.
        seen = mx.where(self._in_window & (windows >= 0), windows, fed[..., None])
        values = mx.take_along_axis(logits, seen, axis=-1)
        values = mx.where(values < 0, values * self._repetition, values / self._repetition)
        return mx.put_along_axis(logits, seen, values, axis=-1)

    def _windows(self, joined: mx.array, fed: int) -> mx.array:
        """[B, T, W]: the last tokens as of each fed one."""
        if fed == 1:
            return joined[:, None, 1:]
        return joined[:, mx.arange(fed)[:, None] + mx.arange(1, self._width + 1)]

    def _counted(self, before: mx.array, own: mx.array | None, fed: mx.array) -> mx.array:
        """[B, T, V]: how often each token was generated, as of each fed one."""
        if fed.shape[1] == 1:
            one = mx.ones(fed.shape) if own is None else own.astype(mx.float32)
            counts: Any = before
            after: mx.array = counts.at[mx.arange(fed.shape[0])[:, None], fed].add(one)
            return after[:, None]
        if own is not None:
            fed = mx.concatenate([mx.where(own, fed[:, :1], -1), fed[:, 1:]], axis=1)
        return before[:, None] + mx.cumsum(self._counts(fed[:, :, None]), axis=1)

    def _counts(self, tokens: mx.array) -> mx.array:
        """[..., V]: how often each token occurs in [..., N]; -1 is none."""
        *outer, size = tokens.shape
        vocabulary = self._vocabulary
        flat = tokens.reshape(math.prod(outer), size)
        # The extra column takes the -1s.
        counts: Any = mx.zeros((flat.shape[0], vocabulary + 1))
        columns = mx.where(flat < 0, vocabulary, flat)
        counts = counts.at[mx.arange(flat.shape[0])[:, None], columns].add(1.0)
        found: mx.array = counts[:, :vocabulary].reshape(*outer, vocabulary)
        return found


def _right_justified(tokens: Sequence[Sequence[int]], width: int) -> mx.array:
    """[B, width], the places without a token -1; those that no row fills never pass through the host."""
    longest = max(map(len, tokens))
    if not longest:
        return mx.full((len(tokens), width), -1, dtype=mx.int32)
    filled = mx.array([[-1] * (longest - len(row)) + list(row) for row in tokens], dtype=mx.int32)
    return mx.pad(filled, [(0, 0), (width - longest, 0)], constant_values=-1)
