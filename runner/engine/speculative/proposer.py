"""The draft model beside a batch: it reads along, and proposes tokens for every row at once.

What the draft has seen decides how good its proposals are, and nothing else. So it never reads more than the last
tokens of a row that it does not know, and none of them again when it has fallen behind a little. Its caches hold each
row's tokens but for the last two: a round feeds it those, so that a round whose proposals were all kept leaves no gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.filters import NONE
from runner.engine.kv.caches import Caches, Held, Traced, order_without
from runner.engine.kv.layout import Layout
from runner.engine.memory import coming
from runner.engine.row import Row
from runner.engine.sampling import Sampler, State, repeated_last
from runner.engine.speculative.verify import Proposal, sequence
from runner.engine.traced import KeptGraphs, TracedCalls

_READS: Final = 1024
"""Tokens of a row that the draft reads at most, before it proposes the first."""

_READS_TOGETHER: Final = 4096
"""Tokens of all rows, likewise: everybody waits meanwhile."""

_MOST_GONE: Final = 16
"""Times that rows have left since the last round, after which what the draft has of the others is let go as well."""

_CALL: Final = 2048
"""Tokens in one call while it reads."""

_Own = tuple[list[mx.array], list[mx.array]]
"""A sampler's arrays, and positions where rows draw."""


class Proposer:
    """The draft's caches for the rows of a batch."""

    def __init__(self, model: Any, layout: Layout, own: int, vocabulary: int) -> None:
        """`own` is the width of the draft's logits, `vocabulary` that of the target's."""
        self._model = model
        self._call = TracedCalls(model)
        self._graphs = KeptGraphs()
        self._layout = layout
        self._own = own
        self._vocabulary = vocabulary
        self._caches: Caches | None = None
        self._rows: list[Row] = []
        # How many tokens of each row it has come to; those before may have been left out.
        self._at: list[int] = []
        self._own_arrays: tuple[Sampler, int, list[mx.array]] | None = None
        # Rows that have left, and have to leave the caches before these are used again: plain steps do not wait for it.
        self._gone: list[Sequence[int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return 0 if self._caches is None else self._caches.nbytes

    @property
    def building(self) -> float:
        """Seconds spent so far on building graphs that are kept."""
        return self._call.building + self._graphs.building

    def narrow(self) -> bool:
        """Let go of room that the rows do not need; False if there is none."""
        self._let_go()
        return self._caches is not None and self._caches.narrow()

    def missed(self, rows: Sequence[Row]) -> int:
        """Tokens to be read before it can propose for `rows`."""
        known, most = len(self._rows) if self._knows(rows) else 0, _reads(rows)
        behind = sum([max(0, _due(row) - at) for row, at in zip(rows[:known], self._at[:known], strict=True)])
        return behind + sum([min(_due(row), most) for row in rows[known:]])

    def ready(self, rows: Sequence[Row]) -> bool:
        """Whether it can propose for `rows`, with nothing to be read."""
        return len(self._rows) == len(rows) and all(
            mine is row and at >= _due(row) for mine, row, at in zip(self._rows, rows, self._at, strict=True)
        )

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Read what was missed of `rows`, whose tokens the host knows, but for the one that a plain step is making."""
        if not self._knows(rows):
            self.clear()
        self._let_go()
        if self._caches is not None:
            behind = zip(self._rows, self._at, strict=True)
            self._read(self._caches, [_tokens(row)[at : _due(row)] for row, at in behind])
        if new := list(rows[len(self._rows) :]):
            texts = [_tokens(row)[: _due(row)][-_reads(rows) :] for row in new]
            # It has what it reads, and what comes after it of the row.
            ends = [max(1, len(text) + coming(row) - _due(row)) for text, row in zip(texts, new, strict=True)]
            caches = self._layout.restore([None] * len(new), ends=ends)
            self._read(caches, texts)
            if self._caches is None:
                self._caches = caches
            else:
                self._caches.join(caches)
        self._rows = list(rows)
        self._at = [_due(row) for row in rows]

    def propose(self, last: mx.array, count: int, sampler: Sampler) -> Proposal:
        """`count` tokens for each row, to follow `last` [B, 2], its last two."""
        self._let_go()
        caches = self._caches
        assert caches is not None
        caches.mark()
        shape = caches.shape(count + 1)
        if shape is None or sampler.form is None:
            return self._one_by_one(lambda tokens: self._call(caches, tokens), last, count, sampler)
        # Rows come and go, and each number of them would want a graph of its own.
        proposing, position, rows, padded = sampler.proposing, sampler.state.position, caches.rows, caches.padded
        positions = [] if position is None else [repeated_last(position, padded) + _numbers(count)]
        arrays = self._arrays(proposing, padded)

        def trace(last: mx.array, starts: mx.array, own: _Own, held: Held) -> Traced[list[mx.array]]:
            return self._together(caches, proposing.having(own[0]), last, starts, own[1], held)

        def call(graph: Callable[..., Traced[list[mx.array]]]) -> Proposal:
            # What is made of starts and positions here is what a graph would compile a kernel for.
            made, *logits = caches.call_graph(
                lambda last, starts, held: graph(last, starts + _begun(count), (arrays, positions), held), last, padded
            )
            if padded > rows:
                made, logits = made[:rows], [all_of_them[:rows] for all_of_them in logits]
            return Proposal(made, sampler.draw.weights(logits[0]) if sampler.draw is not None and logits else None)

        def build() -> Proposal:
            return self._one_by_one(lambda tokens: caches.call(self._model, tokens), last, count, sampler)

        return self._graphs.run((shape[1:], padded, proposing.form), trace, call, build)

    def _arrays(self, proposing: Sampler, rows: int) -> list[mx.array]:
        """What it chooses by, of so many rows; made once for the rows of a batch."""
        if self._own_arrays is None or self._own_arrays[0] is not proposing or self._own_arrays[1] != rows:
            self._own_arrays = proposing, rows, [repeated_last(array, rows) for array in proposing.arrays]
        return self._own_arrays[2]

    def _together(
        self,
        caches: Caches,
        sampler: Sampler,
        last: mx.array,
        starts: mx.array,
        positions: list[mx.array],
        held: Held,
    ) -> Traced[list[mx.array]]:
        """All proposals as one graph: their sequence, and the logits [B, K, V] if they are wanted of rows that draw.

        `starts` [K + 1, B] are those of each call, and of the next round if all is kept; `positions` [K, B, 1], if any.
        """
        feeding, tokens, logits = last, [], []
        for number in range(starts.shape[0] - 1):
            answer, held, _ = caches.trace(self._model, self._readable(feeding), _line(starts, number), held)
            logits.append(self._fitted(answer[:, -1:]))
            state = State(_line(positions[0], number) if positions else None, None)
            feeding = sampler.choose(logits[-1], feeding, state).tokens
            tokens.append(feeding)
        wanted = [mx.concatenate(logits, axis=1)] if sampler.unbound else []
        return [sequence(last[:, 1:], tokens), *wanted], held, _line(starts, len(tokens))

    def _one_by_one(
        self, answer: Callable[[mx.array], mx.array], last: mx.array, count: int, sampler: Sampler
    ) -> Proposal:
        """The proposals of calls by themselves; `answer` is the model."""
        feeding, new, state = last, last[:, 1:], sampler.state
        tokens, weights = [], []
        for _ in range(count):
            logits = answer(self._readable(feeding))[:, -1:]
            choice = sampler.proposing.choose(self._fitted(logits), new, state)
            state = choice.after()
            feeding = new = choice.tokens
            tokens.append(choice.tokens)
            if sampler.unbound and choice.weights is not None:
                weights.append(choice.weights)
        return Proposal(sequence(last[:, 1:], tokens), mx.concatenate(weights, axis=1) if weights else None)

    def dispatched(self) -> None:
        """What was proposed has been started, by whoever started what depends on it."""
        if self._caches is not None:
            self._caches.dispatched()

    def keep(self, counts: mx.array) -> None:
        """Of what it has read since it began to propose, keep the first `counts` [B] tokens; `settle` follows."""
        assert self._caches is not None
        self._caches.keep(counts)

    def settle(self, refused: Sequence[int], said: Sequence[int]) -> None:
        """The host has read the counts of the oldest `keep`; row i said `said[i]` tokens."""
        assert self._caches is not None
        self._caches.settle(refused)
        self._at = [at + more for at, more in zip(self._at, said, strict=True)]

    def remove(self, indices: Sequence[int], rows: Sequence[Row]) -> None:
        """Let go of rows of a batch; `rows` are those that are left, in the batch's new order."""
        if self._caches is None or len(self._rows) != len(indices) + len(rows):
            self.clear()
            return
        order = order_without(len(self._rows), indices)
        self._gone.append(indices)
        self._rows, self._at = [self._rows[i] for i in order], [self._at[i] for i in order]
        if len(self._gone) > _MOST_GONE:
            self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._caches, self._rows, self._at, self._gone = None, [], [], []
        self._own_arrays = None

    def _let_go(self) -> None:
        """Have rows leave the caches that have left the batch."""
        if self._caches is not None:
            for indices in self._gone:
                self._caches.remove(indices)
        self._gone = []

    def _knows(self, rows: Sequence[Row]) -> bool:
        """Whether its rows are the first of these, and it has not missed too much of them."""
        known = len(self._rows)
        if known > len(rows) or any(mine is not row for mine, row in zip(self._rows, rows, strict=False)):
            return False
        return all(_due(row) - at <= _reads(rows) for row, at in zip(self._rows, self._at, strict=True))

    def _read(self, caches: Caches, texts: Sequence[list[int]]) -> None:
        longest = max(map(len, texts))
        width = max(1, _CALL // len(texts))
        for begin in range(0, longest, width):
            parts = [text[begin : begin + width] for text in texts]
            lengths = [len(part) for part in parts]
            padded = [part + [0] * (max(lengths) - len(part)) for part in parts]
            caches.call(self._model, self._readable(mx.array(padded, dtype=mx.uint32)), lengths)
            start(caches.arrays)
            # Else the next graph would have to wait for it, and so would be another one.
            caches.dispatched()

    def _readable(self, tokens: mx.array) -> mx.array:
        """Tokens of the target; those that the draft has no entry for become its last one."""
        return tokens if self._own >= self._vocabulary else mx.minimum(tokens, self._own - 1)

    def _fitted(self, logits: mx.array) -> mx.array:
        """The draft's logits, as wide as the target's. Models of one tokenizer may round its size up differently."""
        if self._own > self._vocabulary:
            return logits[..., : self._vocabulary]
        if self._own < self._vocabulary:
            missing = mx.full((*logits.shape[:-1], self._vocabulary - self._own), NONE, dtype=logits.dtype)
            return mx.concatenate([logits, missing], axis=-1)
        return logits


def _reads(rows: Sequence[Row]) -> int:
    return min(_READS, _READS_TOGETHER // len(rows))


def _tokens(row: Row) -> list[int]:
    return row.prompt + row.generated


def _due(row: Row) -> int:
    """How many of a row's tokens the draft should have seen: all but the last two."""
    return max(0, len(row.prompt) + len(row.generated) + row.unread - 2)


def _line(array: mx.array, number: int) -> mx.array:
    """[…] of [N, …], as a view: an index by itself is a launch."""
    return array[number : number + 1].squeeze(0)


# Kept: a device waits tens of microseconds for numbers that the host has just written.


@cache
def _numbers(count: int) -> mx.array:
    """[count, 1, 1]: 0, 1, 2, …"""
    return mx.arange(count, dtype=mx.uint32)[:, None, None]


@cache
def _begun(count: int) -> mx.array:
    """[count + 1, 1]: tokens that a round's calls begin after. The first has two, the others have one."""
    return mx.array([[0], *([number + 2] for number in range(count))], dtype=mx.int32)
