"""The rows that decode together: one model call gives each its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.layers import RowSlots
from runner.engine.arrays import start
from runner.engine.row import Row
from runner.engine.sampling import Logprobs, Sampler

Caches = list[Any]
"""One cache a layer, of upstream's classes."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens of one dispatched step, maybe not computed yet: `tokens` [rows], `rows` as they were then."""

    rows: list[Row]
    tokens: mx.array
    logprobs: Logprobs | None


class DecodeBatch:
    """Rows, their merged caches, and the token each is fed next."""

    def __init__(self, model: Any, bank: AdapterBank, vocabulary: int) -> None:
        """`vocabulary` is the width of the model's logits."""
        self.rows: list[Row] = []
        self._model = model
        self._bank = bank
        self._vocabulary = vocabulary
        self._caches: Caches = []
        self._tokens: mx.array | None = None
        self._sampler: Sampler | None = None
        self._slots: RowSlots | None = None
        self._slots_version = -1

    def join(self, rows: Sequence[Row], caches: Caches) -> None:
        """Add rows whose caches hold their prompts but for the last token."""
        tokens = mx.array([row.prompt[-1] for row in rows], dtype=mx.uint32)
        if self._tokens is None:
            self._caches, self._tokens = caches, tokens
        else:
            for mine, new in zip(self._caches, caches, strict=True):
                mine.extend(new)
            self._tokens = mx.concatenate([self._tokens, tokens])
        self.rows.extend(rows)
        self._changed()

    def keep(self, indices: list[int]) -> None:
        """Let go of all rows but these."""
        self.rows = [self.rows[i] for i in indices]
        self._changed()
        if not indices:
            self._caches, self._tokens = [], None
            return
        assert self._tokens is not None
        kept = mx.array(indices, dtype=mx.int32)
        for cache in self._caches:
            cache.filter(kept)
        self._tokens = self._tokens[kept]

    def extract(self, index: int) -> Caches:
        """A copy of one row's caches, by itself."""
        caches = [cache.extract(index) for cache in self._caches]
        # Not evaluated, it would hold on to the whole batch.
        start([cache.state for cache in caches])
        return caches

    def dispatch(self) -> StepResult:
        """Start the computation of every row's next token, without waiting for it."""
        assert self._tokens is not None
        if self._sampler is None:
            self._sampler = Sampler([row.sampling_row() for row in self.rows], self._vocabulary)
        if self._slots_version != self._bank.version:
            self._slots = self._bank.slots([row.adapter for row in self.rows])
            self._slots_version = self._bank.version
        self._bank.apply(self._slots)
        logits = self._model(self._tokens[:, None], cache=self._caches)[:, -1, :]
        tokens, logprobs = self._sampler(logits, self._tokens)
        start(tokens, *(logprobs.arrays() if logprobs is not None else ()))
        self._tokens = tokens
        for row in self.rows:
            row.started = True
        return StepResult(list(self.rows), tokens, logprobs)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(cache.nbytes for cache in self._caches)

    def _changed(self) -> None:
        self._sampler = None
        self._slots_version = -1
