"""Steps of the batch: one is started, and while the device works on it, what the one before has made is dealt with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from runner.engine.batch import DecodeBatch, StepResult
from runner.engine.grammar.masks import GrammarMasks, Mask
from runner.engine.kv.caches import Caches
from runner.engine.limits import Counters
from runner.engine.loader import LoadedModel
from runner.engine.logprobs import read_logprobs
from runner.engine.row import Row
from runner.engine.speculative.speculation import Speculation
from runner.protocol import Delta, TokenLogprob


class Decoding:
    """The batch, and the step that is under way. `send` gets what clients are told, by step."""

    def __init__(
        self,
        loaded: LoadedModel,
        batch: DecodeBatch,
        speculation: Speculation | None,
        send: Callable[[list[Delta]], None],
    ) -> None:
        self.counters = Counters()
        self.ahead = rounds_ahead()
        self._batch = batch
        self._tokenizer = loaded.tokenizer
        self._speculation = speculation
        self._masks = GrammarMasks(loaded.vocabulary)
        self._send = send
        self._in_flight: StepResult | None = None
        self._begins = False

    # ------------------------------------------------------------- rows

    def join(self, rows: Sequence[Row], caches: Caches, soon: int = 0) -> None:
        """Add rows whose caches hold their prompts but for the last token; so many more will come `soon`."""
        self._settle()
        first = not self._batch.rows
        self._begins = self._begins or first
        self._batch.join(rows, caches, soon)
        if self._speculation is not None:
            self._speculation.joined(rows, under_way=self._in_flight is not None, first=first)

    def ended(self) -> list[Row]:
        """Rows that are done. No step is under way then whose outcome decides how much of them is computed."""
        if not self.ahead or any(row.done for row in self._batch.rows):
            self._settle()
        return [row for row in self._batch.rows if row.done]

    def computed(self, row: Row) -> tuple[list[int], Caches, int]:
        """Tokens of a row that `ended`, and the caches with what the model has computed of them, in which row."""
        caches = self._batch.caches
        return row.prompt + row.generated + row.beyond, caches, self._batch.rows.index(row)

    def remove_ended(self) -> None:
        """Let go of the rows that `ended` has told of."""
        if ended := [i for i, row in enumerate(self._batch.rows) if row.done]:
            self._batch.remove(ended)
            self.disturbed(rows=len(ended))

    def abandon(self) -> list[Row]:
        """Give everything up, after a failure; returns the rows."""
        rows, self._in_flight = self._batch.rows, None
        self._batch.remove(range(len(rows)))
        return rows

    def disturbed(self, *, rows: int = 0, tokens: int = 0) -> None:
        """Something else than steps takes time: how long the next ones take tells nothing of them.

        It were so many `rows` that left, or `tokens` of prompts.
        """
        if self._speculation is not None:
            self._speculation.disturbed(under_way=self._in_flight is not None, rows=rows, tokens=tokens)

    # ------------------------------------------------------------- steps

    def step(self, most: int) -> None:
        """Start the next step, in which the draft proposes at most `most` tokens; deal with the one before.

        What a grammar allows next depends on the tokens before: with one in the batch, they are read while the model
        is called.
        """
        if not self._batch.rows:
            self._finish()
            return
        proposals = self._proposals(most)
        begins, self._begins = self._begins, False
        before, self._in_flight = self._in_flight, None
        self._forward(proposals, under_way=before is not None)
        if not self._batch.constrained:
            self._in_flight = self._batch.sample(None)
            deltas = self._read(before, proposals)
            # First tokens of rows that found an empty batch: nobody else's steps wait for them, and the next one would
            # be built before they are looked at.
            self._tell(deltas + self._finished() if begins else deltas)
            return
        deltas = self._read(before, proposals)
        try:
            self._in_flight = self._batch.sample(self._mask(deltas))
        finally:
            self._tell(deltas)

    def _proposals(self, most: int) -> int:
        """How many tokens the draft proposes in the next step; it has caught up with the rows then."""
        speculation, rows = self._speculation, self._batch.rows
        if speculation is None:
            return 0
        proposals = speculation.decide(rows, most, changed=not self._batch.composed)
        if proposals and not self.ahead:
            self._finish()
        if proposals and not speculation.proposer.ready(rows):
            self._settle()
            speculation.catch_up(rows, under_way=self._in_flight is not None)
        return proposals

    def _forward(self, proposals: int, *, under_way: bool) -> None:
        """Call the model; what has to be built first is no part of what such steps take."""
        built = self._batch.building
        self._batch.forward(proposals)
        if self._speculation is not None and (seconds := self._batch.building - built):
            self._speculation.built(seconds, under_way=under_way)

    def _settle(self) -> None:
        """Read the round under way, if there is one: until then nobody knows how long rows are."""
        if self._in_flight is not None and self._in_flight.proposed:
            self._finish()

    def _finish(self) -> None:
        """Read the step under way, if there is one, before another is started."""
        self._tell(self._finished())

    def _finished(self) -> list[Delta]:
        before, self._in_flight = self._in_flight, None
        deltas = self._read(before, None)
        for row in self._batch.rows:
            row.unread = False
        return deltas

    def _mask(self, deltas: list[Delta]) -> Mask | None:
        """What grammars allow next. Rows whose grammar has ended do as well, and their last delta is added."""
        rows = self._batch.rows
        grammars = [None if row.done else row.grammar for row in rows]
        if (proposed := self._batch.read_proposed()) is None:
            mask = self._masks.next(grammars)
        else:
            going_on = [(i, g, proposed[i]) for i, g in enumerate(grammars) if g is not None and not g.ended]
            mask = self._masks.drafted(going_on, len(proposed[0]) + 1)
        for row, grammar in zip(rows, grammars, strict=True):
            if grammar is not None and grammar.ended:
                deltas.append(row.end_of_grammar())
        return mask

    def _read(self, result: StepResult | None, following: int | None) -> list[Delta]:
        """Wait for a step's tokens; what every row that still runs gets for its own.

        `following` is how many tokens are proposed in the step that is under way, None without one.
        """
        if result is None:
            return []
        tokens, kept = result.read()
        if result.proposed:
            self._batch.settle(result, kept)
        logprobs: dict[int, list[TokenLogprob]] = {}
        if result.logprobs is not None:
            logprobs = read_logprobs(result.logprobs, result.rows, tokens, self._tokenizer)
        deltas = []
        for i, row in enumerate(result.rows):
            if row.done:
                row.beyond += tokens[i]
                continue
            deltas.append(row.say(tokens[i], logprobs.get(i), result.proposed))
            if result.proposed:
                self._learn(row, kept[i], result.proposed)
        self.counters.completion_tokens += sum([delta.tokens for delta in deltas])
        if self._speculation is not None:
            running = len(deltas) or len(result.rows)
            said = sum([delta.tokens for delta in deltas]) if deltas else sum(map(len, tokens))
            self._speculation.ended(len(result.rows), result.proposed, said / running, following)
        return deltas

    def _tell(self, deltas: list[Delta]) -> None:
        """Send them; a grammar that cannot be followed is a failure of its row alone."""
        self.counters.failed += sum([delta.finish_reason == "error" for delta in deltas])
        self._send(deltas)

    def _learn(self, row: Row, kept: int, proposed: int) -> None:
        assert self._speculation is not None
        self._speculation.learn(row, kept, proposed)
        self.counters.accepted += kept
        self.counters.drafted += proposed


def rounds_ahead() -> bool:
    """Whether a round is started before the one before it has been read.

    MLX keeps so little of a computation waiting on the CPU that whoever starts one is held up until it has nearly run:
    started ahead, a round has nothing to overlap with, is in vain for rows that have ended, and has to do with lengths
    that only the device knows.
    """
    return bool(mx.default_device() != mx.Device(mx.cpu))
