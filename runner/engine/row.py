"""One request on its way through the engine, as the host sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from runner.engine.adapters.bank import Resident
from runner.engine.detokenizer import Detokenizer
from runner.engine.sampling import SamplingRow
from runner.engine.stops import StopStrings
from runner.protocol import Delta, FinishReason, Sampling, TokenLogprob, Usage


@dataclass(slots=True, eq=False)
class Row:
    """A request's tokens and how it ends.

    `max_tokens` already fits the context. `generated` are the tokens that have been read back from the device; one
    more may be under way. `started` says that the row has been fed its last prompt token. `cached` prompt tokens came
    from the prefix cache. `done` rows leave the batch; `completed` ones were neither cancelled nor failed.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    seed: int
    max_tokens: int
    eos_ids: frozenset[int]
    detokenizer: Detokenizer
    stops: StopStrings
    adapter: Resident | None = None
    generated: list[int] = field(default_factory=list)
    cached: int = 0
    started: bool = False
    done: bool = False
    completed: bool = False

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
        return Usage(len(self.prompt), len(self.generated), self.cached)

    def advance(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take the next token; what the client gets for it."""
        self.generated.append(token)
        if token in self.eos_ids:
            return self._end("stop", self._rest(), None)
        text, stopped = self.stops.feed(self.detokenizer.add(token))
        logprobs = None if logprob is None else [logprob]
        if stopped:
            return self._end("stop", text, logprobs)
        if len(self.generated) >= self.max_tokens:
            rest = self._rest()
            return self._end("length", text + rest, logprobs)
        return Delta(self.id, text, 1, None, None, logprobs)

    def fail(self, error: str) -> Delta:
        """End with an error."""
        self.done = True
        return Delta(self.id, "", 0, "error", self.usage, None, error)

    def sampling_row(self) -> SamplingRow:
        """What a sampler built now needs."""
        return SamplingRow(self.sampling, self.seed, self.prompt, self.generated, self.started)

    def _rest(self) -> str:
        text, stopped = self.stops.feed(self.detokenizer.flush())
        return text if stopped else text + self.stops.flush()

    def _end(self, reason: FinishReason, text: str, logprobs: list[TokenLogprob] | None) -> Delta:
        self.done = self.completed = True
        return Delta(self.id, text, 1, reason, self.usage, logprobs)
