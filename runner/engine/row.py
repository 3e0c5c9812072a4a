"""One request on its way through the engine, as the host sees it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import structs

from runner.engine.adapters.bank import Resident
from runner.engine.answer.pieces import Parser
from runner.engine.detokenizer import Detokenizer
from runner.engine.grammar.matcher import RowGrammar
from runner.engine.grammar.preface import Preface
from runner.engine.sampling import SamplingRow
from runner.engine.speculative.policy import Acceptance
from runner.engine.stops import StopStrings
from runner.protocol import Delta, FinishReason, Grammar, Sampling, TokenLogprob, ToolCall, Usage


class Row(msgspec.Struct, eq=False):
    """A request's tokens and how it ends.

    `max_tokens` already fits the context; `open_ended` rows asked for no length. `generated` are the tokens that have
    been read back from the device; `unread` says that a plain step is making one more. `beyond` are those that came
    after the end. `cached` prompt tokens came from the prefix cache, `accepted` of the generated ones from the draft,
    which proposed `rejected` more; `acceptance` is how often that goes well. `grammar` is how far the answer has come
    in the one that it has to match, `preface` what may come before the answer. `done` rows leave the batch;
    `completed` ones were neither cancelled nor failed. `parser` takes the text apart, None where all of it is
    content; the answer ends with its first call if `one_call`. `asked` is the grammar before it is compiled.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    seed: int
    max_tokens: int
    eos_ids: frozenset[int]
    detokenizer: Detokenizer
    stops: StopStrings
    parser: Parser | None = None
    preface: Preface | None = None
    one_call: bool = False
    open_ended: bool = False
    asked: Grammar | None = None
    adapter: Resident | None = None
    grammar: RowGrammar | None = None
    generated: list[int] = msgspec.field(default_factory=list)
    cached: int = 0
    unread: bool = False
    done: bool = False
    completed: bool = False
    called: bool = False
    reasoning_tokens: int = 0
    beyond: list[int] = msgspec.field(default_factory=list)
    accepted: int = 0
    rejected: int = 0
    acceptance: Acceptance = msgspec.field(default_factory=Acceptance)

    @property
    def adapter_key(self) -> str:
        """Key of the adapter the row began with, "" for none."""
        return "" if self.adapter is None else self.adapter.key

    @property
    def reusable(self) -> bool:
        """Whether later prompts may build on this one: not when its adapter is on its way out."""
        return self.adapter is None or not self.adapter.dropped

    @property
    def uncached(self) -> int:
        """Tokens of the prompt that prefill has to compute: all but the cached ones and the last."""
        return len(self.prompt) - 1 - self.cached

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            len(self.prompt),
            len(self.generated),
            self.cached,
            self.accepted,
            self.rejected,
            reasoning_tokens=self.reasoning_tokens,
        )

    def say(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None, proposed: int) -> Delta:
        """Take the next tokens, all but the last of them the first of `proposed`; what comes after the end is not said.

        What the client gets for them is one delta.
        """
        self.rejected += proposed
        deltas: list[Delta] = []
        for i, token in enumerate(tokens):
            if i < len(tokens) - 1:
                self.accepted += 1
                self.rejected -= 1
            deltas.append(self.advance(token, None if logprobs is None else logprobs[i]))
            if self.done:
                self.beyond += tokens[i + 1 :]
                break
        return deltas[0] if len(deltas) == 1 else _joined(deltas)

    def advance(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take the next token; what the client gets for it."""
        self.generated.append(token)
        if token in self.eos_ids:
            return self._end("stop", self._rest(), None)
        text, stopped = self.stops.feed(self.detokenizer.add(token))
        logprobs = None if logprob is None else [logprob]
        if stopped:
            return self._end("stop", text, logprobs)
        if self.grammar is not None:
            self.grammar.advance(token)
            if self.grammar.ended:
                return self._end_of_grammar(text, 1, logprobs)
        if len(self.generated) >= self.max_tokens:
            rest = self._rest()
            return self._end("length", text + rest, logprobs)
        if self.parser is None:
            return Delta(self.id, text, 1, None, self._first_usage, logprobs)
        return self._parsed(self.parser, text, None, logprobs)

    @property
    def _first_usage(self) -> Usage | None:
        return self.usage if len(self.generated) == 1 else None

    def end_of_grammar(self) -> Delta:
        """End because the grammar has, as was found only when the next token was to be chosen."""
        return self._end_of_grammar("", 0, None)

    def fail(self, error: str) -> Delta:
        """End with an error."""
        self.done = True
        return Delta(self.id, "", 0, "error", self.usage, None, error)

    def sampling_row(self) -> SamplingRow:
        """What a sampler built now needs."""
        return SamplingRow(self.sampling, self.seed, self.prompt, self.generated, self.unread)

    def _rest(self) -> str:
        text, stopped = self.stops.feed(self.detokenizer.flush())
        return text if stopped else text + self.stops.flush()

    def _end_of_grammar(self, text: str, tokens: int, logprobs: list[TokenLogprob] | None) -> Delta:
        assert self.grammar is not None
        if error := self.grammar.error:
            return self.fail(error)
        return self._end("stop", text + self._rest(), logprobs, tokens)

    def _end(self, reason: FinishReason, text: str, logprobs: list[TokenLogprob] | None, tokens: int = 1) -> Delta:
        self.done = self.completed = True
        if self.parser is None:
            return Delta(self.id, text, tokens, reason, self.usage, logprobs, stop=self.stops.matched)
        return self._parsed(self.parser, text, reason, logprobs, tokens)

    def _parsed(
        self,
        parser: Parser,
        text: str,
        reason: FinishReason | None,
        logprobs: list[TokenLogprob] | None,
        tokens: int = 1,
    ) -> Delta:
        """The text's parts; the row ends with its first call, if that is to be its only one."""
        pieces = parser.feed(text)
        self.reasoning_tokens += parser.reasoning
        if reason is not None:
            pieces += parser.finish(cut=reason == "length")
        calls = [ToolCall(piece.call.name, piece.call.arguments, piece.call.id) for piece in pieces if piece.call]
        self.called = self.called or bool(calls)
        if calls and self.one_call:
            calls, reason = calls[:1], "stop"
            self.done = self.completed = True
        if self.called and reason == "stop":
            reason = "tool_calls"
        return Delta(
            self.id,
            "".join([piece.text for piece in pieces if piece.kind == "content"]),
            tokens,
            reason,
            self._first_usage if reason is None else self.usage,
            logprobs,
            reasoning="".join([piece.text for piece in pieces if piece.kind == "reasoning"]),
            calls=calls or None,
            stop=self.stops.matched,
        )


def _joined(deltas: Sequence[Delta]) -> Delta:
    """One delta for several of the same row, of which only the last can be its end."""
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    calls = [call for delta in deltas for call in delta.calls or ()]
    return structs.replace(
        last,
        text="".join([delta.text for delta in deltas]),
        tokens=sum([delta.tokens for delta in deltas]),
        usage=last.usage or deltas[0].usage,
        logprobs=logprobs or None,
        reasoning="".join([delta.reasoning for delta in deltas]),
        calls=calls or None,
    )
