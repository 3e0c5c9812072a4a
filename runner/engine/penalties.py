"""Repetition, presence and frequency penalties for all rows at once.

`repetition_penalty` divides a positive logit, and multiplies a negative one, of every token among the last
`repetition_context_size` of prompt and answer (Keskar et al., arXiv:1909.05858, as in mlx-lm). `presence_penalty` is
subtracted once from each token the model has generated, `frequency_penalty` as often as it has (as OpenAI documents
them; mlx-lm counts the last 20 tokens, prompt included).

The tokens live in two right-justified arrays, -1 where a row has none, that grow by the token fed in each step: the
step before it may still be running, so the host does not know that token yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from runner.engine.sampling import SamplingRow


class Penalties:
    """The penalties of one composition of the batch."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary: int) -> None:
        settings = [row.sampling for row in rows]
        self._vocabulary = vocabulary
        self._repetition: mx.array | None = None
        self._generated: mx.array | None = None
        sizes = [s.repetition_context_size if s.repetition_penalty != 1 else 0 for s in settings]
        if width := max(sizes):
            self._repetition = mx.array([[s.repetition_penalty] for s in settings])
            self._in_window = mx.arange(width)[None] >= width - mx.array([[size] for size in sizes])
            self._recent = _right_justified([row.before(width) for row in rows], width)
        if any(s.presence_penalty or s.frequency_penalty for s in settings):
            self._presence = mx.array([[s.presence_penalty] for s in settings])
            self._frequency = mx.array([[s.frequency_penalty] for s in settings])
            own = [row.generated for row in rows]
            self._generated = _right_justified(own, max(map(len, own)))
            # A row's first step feeds it the last token of its prompt, which is not the model's.
            self._fed_generated: mx.array | None = mx.array([row.started for row in rows])

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], vocabulary: int) -> Penalties | None:
        """The penalties of `rows`, None when no row has one."""
        for row in rows:
            s = row.sampling
            if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty:
                return cls(rows, vocabulary)
        return None

    def __call__(self, logits: mx.array, fed: mx.array) -> mx.array:
        """Logits [B, V] after the tokens `fed` [B], penalised."""
        fed = fed.astype(mx.int32)
        if self._repetition is not None:
            self._recent = mx.concatenate([self._recent[:, 1:], fed[:, None]], axis=1)
            seen = self._counts(mx.where(self._in_window, self._recent, -1)) > 0
            penalised = mx.where(logits < 0, logits * self._repetition, logits / self._repetition)
            logits = mx.where(seen, penalised, logits)
        if self._generated is not None:
            if self._fed_generated is not None:
                fed, self._fed_generated = mx.where(self._fed_generated, fed, -1), None
            self._generated = mx.concatenate([self._generated, fed[:, None]], axis=1)
            counts = self._counts(self._generated)
            logits = logits - self._presence * (counts > 0) - self._frequency * counts
        return logits

    def _counts(self, tokens: mx.array) -> mx.array:
        """[B, V]: how often each token occurs in a row of [B, T]; -1 is none."""
        rows, vocabulary = tokens.shape[0], self._vocabulary
        # The extra column takes the -1s.
        counts: Any = mx.zeros((rows, vocabulary + 1))
        columns = mx.where(tokens < 0, vocabulary, tokens)
        counts = counts.at[mx.arange(rows)[:, None], columns].add(1.0)
        found: mx.array = counts[:, :vocabulary]
        return found


def _right_justified(tokens: Sequence[Sequence[int]], width: int) -> mx.array:
    if not width:
        return mx.zeros((len(tokens), 0), dtype=mx.int32)
    return mx.array([[-1] * (width - len(row)) + list(row) for row in tokens], dtype=mx.int32)
