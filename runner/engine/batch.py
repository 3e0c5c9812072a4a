"""The rows that decode together: one model call gives each its next token, or its next few."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import msgspec

from runner.engine import zero_copy
from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.layers import RowSlots
from runner.engine.arrays import start, to_list
from runner.engine.grammar.masks import Mask
from runner.engine.kv.caches import Caches
from runner.engine.row import Row
from runner.engine.sampling import Logprobs, Sampler
from runner.engine.speculative.proposer import Proposer
from runner.engine.speculative.verify import Proposal, verify
from runner.engine.traced import TracedCalls
from runner.engine.zero_copy import Posted


class StepResult(msgspec.Struct, frozen=True):
    """Tokens of one dispatched step, maybe not computed yet: `tokens` [rows, 1], `rows` as they were then.

    A round in which `proposed` tokens a row were verified has `tokens` [rows, proposed + 1], of which row i says the
    first `kept[i]` + 1; `kept` [rows]. Where they are `posted`, the host has no need to read these.
    """

    rows: list[Row]
    tokens: mx.array
    logprobs: Logprobs | None
    proposed: int = 0
    kept: mx.array | None = None
    posted: Posted | None = None

    def read(self) -> tuple[list[list[int]], list[int]]:
        """What each row says, and how many proposals it kept; waits until they are computed."""
        tokens, kept = self._read() if self.posted is None else self.posted.read()
        if kept is None:
            return tokens, [0] * len(tokens)
        return [row[: count + 1] for row, count in zip(tokens, kept, strict=True)], kept

    def _read(self) -> tuple[list[list[int]], list[int] | None]:
        return to_list(self.tokens), None if self.kept is None else to_list(self.kept)


class DecodeBatch:
    """Rows, their caches, and the last two tokens of each. Row i of them all is the same request.

    The host does not know how long rows are while a round is under way whose result it has not `settle`d. Rows must not
    come or go then.
    """

    def __init__(self, model: Any, bank: AdapterBank, vocabulary: int, proposer: Proposer | None = None) -> None:
        """`vocabulary` is the width of the model's logits."""
        self.rows: list[Row] = []
        self._call = TracedCalls(model, bank)
        self._bank = bank
        self._vocabulary = vocabulary
        self._caches: Caches | None = None
        self._tokens: mx.array | None = None
        self._previous: mx.array | None = None
        # Both of them side by side, if a round has left them so.
        self._last: mx.array | None = None
        self._fed: mx.array | None = None
        self._logits: mx.array | None = None
        self._proposer = proposer
        self._proposal: Proposal | None = None
        self._sampler: Sampler | None = None
        self._slots: RowSlots | None = None
        self._padded: tuple[int, RowSlots | None] | None = None
        self._slots_version = -1
        zero_copy.ready()

    def join(self, rows: Sequence[Row], caches: Caches, soon: int = 0) -> None:
        """Add rows whose caches hold their prompts but for the last token; so many more will come `soon`."""
        tokens = mx.array([row.prompt[-1:] for row in rows], dtype=mx.uint32)
        previous = mx.array([row.prompt[-2:][:1] for row in rows], dtype=mx.uint32)
        if self._caches is None or self._tokens is None or self._previous is None:
            self._caches, self._tokens, self._previous = caches, tokens, previous
        else:
            self._caches.join(caches, soon)
            self._tokens = mx.concatenate([self._tokens, tokens])
            self._previous = mx.concatenate([self._previous, previous])
        self.rows.extend(rows)
        self._changed()

    def remove(self, indices: Sequence[int]) -> None:
        """Let go of rows. The last ones take their places."""
        self._changed()
        if self._caches is None or len(indices) == len(self.rows):
            self.rows, self._caches, self._tokens, self._previous = [], None, None, None
            if self._proposer is not None:
                self._proposer.clear()
            return
        assert self._tokens is not None
        assert self._previous is not None
        order = self._caches.remove(indices)
        self.rows = [self.rows[i] for i in order]
        left = mx.array(order, dtype=mx.int32)
        self._tokens, self._previous = self._tokens[left], self._previous[left]
        if self._proposer is not None:
            self._proposer.remove(indices, self.rows)

    @property
    def caches(self) -> Caches:
        """The rows' caches, while there are rows."""
        assert self._caches is not None
        return self._caches

    def forward(self, proposals: int = 0) -> None:
        """Call the model on every row's last token, for `sample` to choose the next by what it says.

        A round of speculation calls it on so many proposals as well; the proposer has to have caught up with the rows.
        With a grammar in the batch the host must know a row's tokens before it can tell which are allowed next: the
        device then starts on the call at once.
        """
        assert self._caches is not None
        assert self._tokens is not None
        if self._sampler is None:
            self._sampler = Sampler([row.sampling_row() for row in self.rows], self._vocabulary)
        if self._slots_version != self._bank.version:
            self._assign_slots(self._caches.padded)
            self._slots_version = self._bank.version
        self._fed, self._proposal = self._tokens, None
        if proposals:
            assert self._proposer is not None
            assert self._previous is not None
            last = self._last
            if last is None:
                last = mx.concatenate([self._previous, self._tokens], axis=1)
            self._proposal = self._proposer.propose(last, proposals, self._sampler)
            self._fed = self._proposal.fed
            self._caches.mark()
        self._logits = self._call(self._caches, self._fed, self._slots, padded=self._padded)
        if self.constrained:
            start(self._fed, self._logits)
        for row in self.rows:
            row.unread = not proposals

    def _assign_slots(self, padded: int) -> None:
        """Look up the rows' adapters; rows that pad a graph have the last one's, so that rows of one stay of one."""
        adapters = [row.adapter for row in self.rows]
        self._slots = self._bank.slots(adapters)
        more = padded - len(adapters)
        self._padded = (padded, self._bank.slots(adapters + adapters[-1:] * more)) if more else None

    def read_proposed(self) -> list[list[int]] | None:
        """What is proposed for each row in the call under way, None in a plain step; waits for the draft."""
        return None if self._proposal is None else to_list(self._proposal.tokens)

    def sample(self, mask: Mask | None) -> StepResult:
        """Start the computation of every row's next tokens, which `mask` allows, without waiting for them."""
        assert self._sampler is not None
        assert self._logits is not None
        assert self._fed is not None
        proposal, sampler, fed = self._proposal, self._sampler, self._fed
        choice = sampler.choose(self._logits, fed, sampler.state, mask, verifying=proposal is not None)
        self._proposal = self._fed = self._logits = None
        tokens, kept = choice.tokens, None
        if proposal is None:
            self._previous, self._tokens, self._last = self._tokens, tokens, None
        else:
            tokens, kept = verify(proposal, choice, sampler.draw)
            self._keep(proposal, tokens, kept)
        sampler.state = choice.after(kept)
        logprobs, posted = sampler.logprobs(choice.logits, tokens), zero_copy.post(tokens, kept)
        wanted = [tokens] + ([] if kept is None else [kept]) + ([] if posted is None else [posted.done])
        start(wanted, [] if logprobs is None else logprobs.arrays())
        self.caches.dispatched()
        if kept is not None and self._proposer is not None:
            self._proposer.dispatched()
        return StepResult(list(self.rows), tokens, logprobs, tokens.shape[1] - 1, kept, posted)

    def _keep(self, proposal: Proposal, tokens: mx.array, kept: mx.array) -> None:
        """Go on from the first `kept` [rows] proposals of a round, and the token after them."""
        assert self._caches is not None
        assert self._proposer is not None
        places = kept[:, None] + _next_two()
        said = places[:, 1]
        self._caches.keep(said)
        self._proposer.keep(said)
        self._last = mx.take_along_axis(mx.concatenate([proposal.sequence[:, :1], tokens], axis=1), places, axis=1)
        self._previous, self._tokens = self._last[:, :1], self._last[:, 1:]

    def settle(self, result: StepResult, kept: Sequence[int]) -> None:
        """The host has read the result of the oldest round that was not settled."""
        assert self._caches is not None
        assert self._proposer is not None
        refused = [result.proposed - count for count in kept]
        self._caches.settle(refused)
        self._proposer.settle(refused, [count + 1 for count in kept])

    @property
    def composed(self) -> bool:
        """Whether the rows are those of the step before."""
        return self._sampler is not None

    @property
    def constrained(self) -> bool:
        """Whether some row has a grammar."""
        return any(row.grammar is not None for row in self.rows)

    @property
    def room(self) -> tuple[int, int]:
        """Slots, and tokens that each has room for."""
        return (0, 0) if self._caches is None else self._caches.room

    def room_for(self, rows: int, tokens: int) -> tuple[int, int]:
        """The same once so many rows need so much room, with those that will join."""
        return (0, 0) if self._caches is None else self._caches.room_for(rows, tokens)

    def narrow(self) -> bool:
        """Let go of room that the rows do not need; False if there is none."""
        caches = self._caches is not None and self._caches.narrow()
        return (self._proposer is not None and self._proposer.narrow()) or caches

    @property
    def building(self) -> float:
        """Seconds spent so far on building graphs that are kept, the draft's included."""
        return self._call.building + (0.0 if self._proposer is None else self._proposer.building)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return 0 if self._caches is None else self._caches.nbytes

    def _changed(self) -> None:
        self._last = None
        self._sampler = None
        self._slots_version = -1


@cache
def _next_two() -> mx.array:
    # Kept: a device waits tens of microseconds for a number that the host has just written.
    return mx.array([0, 1], dtype=mx.int32)
