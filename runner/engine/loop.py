"""The engine: requests in, tokens out, one step at a time.

`Engine.step` is the whole of it: rows that have ended leave, a chunk of waiting prompts is prefilled, the next token of
every row is dispatched, and while the device works on that, the tokens of the step before are read, decoded and sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import mlx.core as mx

from runner.engine.adapters.bank import AdapterBank
from runner.engine.batch import DecodeBatch
from runner.engine.decoding import Decoding
from runner.engine.grammar.service import Grammars
from runner.engine.intake import Intake
from runner.engine.limits import Counters, Limits
from runner.engine.loader import LoadedModel
from runner.engine.memory import MemoryBudget, cache_bytes
from runner.engine.prefill import Prefiller
from runner.engine.prefix_cache import PrefixCache
from runner.engine.prepared import Prepared
from runner.engine.room import Room
from runner.engine.row import Row
from runner.engine.sharing import Sharing, usual
from runner.engine.speculative.rehearsal import rehearse
from runner.engine.speculative.speculation import Speculation
from runner.errors import EngineDied, RequestError
from runner.protocol import (
    AdapterLoaded,
    AdapterSource,
    Configure,
    Delta,
    FromEngine,
    Generate,
    Rejected,
    Stats,
    Step,
)

logger = logging.getLogger(__name__)

_WITHIN_EVERY: Final = 16
"""Steps between two looks at what the rows have come to; they are counted with more than that ahead."""

_FILLING: Final = 0.25
"""Share of the batch's rows; while more than that are coming, it fills up."""

_CLEAR_EVERY: Final = 512
"""Steps between two returns of unused buffers to the system, as in mlx-lm."""


class Engine:
    """Serves one loaded model. Every method is called by the thread that loaded it.

    `emit` gets what is to be sent to the runner, `memory_limit` is in bytes, 0 for none. `wake` is called, by another
    thread, when an engine that had nothing to do has something. While its `intake` is draining, new requests are
    refused; while its `room` is closed, those that wait are not taken up, unless nothing else is worked on. How prompts
    share model calls is what suits the device, unless `sharing` says otherwise.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: Limits,
        emit: Callable[[FromEngine], None],
        memory_limit: int = 0,
        wake: Callable[[], None] = lambda: None,
        speculation: Speculation | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.limits = limits
        self._loaded = loaded
        self._emit = emit
        self._bank = AdapterBank(loaded.model, loaded.dtype)
        self._prefixes = PrefixCache(limits.prefix_cache_bytes)
        self._grammars = Grammars(loaded.tokenizer, loaded.vocabulary, wake)
        proposer = None if speculation is None else speculation.proposer
        self._batch = DecodeBatch(loaded.model, self._bank, loaded.vocabulary, proposer)
        self._speculation = speculation
        self._decoding = Decoding(loaded, self._batch, speculation, self._say)
        weights, drafted = (0, 0.0) if speculation is None else (speculation.weights_bytes, speculation.token_bytes)
        weights, own = weights + loaded.weights_bytes, cache_bytes(loaded.model, loaded.layout)
        self.budget = MemoryBudget(
            memory_limit, weights, lambda tokens: own(tokens) + tokens * drafted, sizes=loaded.layout.sizes
        )
        self.room = Room(self.budget, self._batch, self._bank, self._prefixes, lambda: self._prefiller.active)
        takes = lambda row, tokens: self.room.takes(row, tokens, self.limits.prefill_step_size)  # noqa: E731
        self._prefiller = Prefiller(
            loaded.model, self._bank, self._prefixes, loaded.layout, takes, usual() if sharing is None else sharing
        )
        self.intake = Intake(loaded, self._bank, self._grammars, self._prefiller, self.room)

    # ------------------------------------------------------------- the step

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._batch.rows or self._prefiller.rows or self._grammars.ready)

    def step(self) -> None:
        """One step; emits one Step frame at most. What fails in it ends the rows concerned with an error.

        Raises EngineDied when nothing can be computed any more; every request has ended then.
        """
        began = time.perf_counter()
        self._prefiller.successors.stepped(began)
        try:
            self._remove_ended()
            self._take_compiled()
            self._start_waiting()
            changed = not self._batch.composed
            self._decoding.step(self._most_proposals())
            if self._batch.rows:
                self._prefiller.pacing.stepped(time.perf_counter() - began, len(self._batch.rows), changed=changed)
        except Exception as error:
            logger.exception("step failed")
            self._abandon(f"the engine failed: {error}")
        self._decoding.counters.steps += 1
        if self._decoding.counters.steps % _WITHIN_EVERY == 0:
            self.room.stay_within()
        if self._decoding.counters.steps % _CLEAR_EVERY == 0:
            mx.clear_cache()

    def _remove_ended(self) -> None:
        """Rows that are done leave; what they have computed is kept for prompts that begin the same."""
        for row in (*self._prefiller.remove_ended(), *self._grammars.remove_ended()):
            self.intake.release(row)
        ended = self._decoding.ended()
        if self._prefixes.enabled:
            kept = [row for row in ended if row.reusable]
            self._prefixes.store_each((row.adapter_key, *self._decoding.computed(row)) for row in kept)
        for row in ended:
            self.intake.release(row)
        self._decoding.remove_ended()

    def _take_compiled(self) -> None:
        """Rows whose grammar has been compiled go on to the queue."""
        for row, refusal in self._grammars.take():
            if refusal is None:
                self._prefiller.waiting.append(row)
            else:
                row.done = True
                self.intake.release(row)
                self._reject(row.id, refusal)

    def _start_waiting(self) -> None:
        """Waiting prompts come nearer, and join the batch once they are prefilled."""
        decoding, chunk = len(self._batch.rows), self.limits.prefill_step_size
        free = self._free
        if free > 0 and self._prefiller.due(free, chunk, decoding):
            computed = self._prefiller.computed
            self._decoding.disturbed()
            for rows, caches in self._prefiller.step(free, chunk, self._batch.room[1], decoding):
                left = max(0, free + decoding - len(self._batch.rows) - len(self._prefiller.active))
                waiting = [*islice(self._prefiller.waiting, left)]
                self._decoding.join(rows, caches, self.room.soon(rows, waiting, free + decoding))
                self._decoding.counters.prompt_tokens += sum(len(row.prompt) for row in rows)
                self._decoding.counters.cached_tokens += sum(row.cached for row in rows)
            self._decoding.disturbed(tokens=round(self._prefiller.computed - computed))

    def _most_proposals(self) -> int:
        """Tokens that the draft may propose: none on the CPU while the batch fills up.

        What a larger batch makes of the same seconds is more there than what a round does, and rows that a round brings
        to their ends sooner leave before the others have come.
        """
        most, free = self.limits.num_draft_tokens, self._free
        if self._speculation is None or self._decoding.ahead or free <= 0:
            return most
        coming = self._prefiller.coming(free, self.limits.prefill_step_size)
        return 0 if coming > len(self._batch.rows) * _FILLING else most

    @property
    def _free(self) -> int:
        """Rows that the batch may have beside those that it has; less than 0 after the limit was lowered."""
        return (self.limits.max_rows if self._loaded.batches else 1) - len(self._batch.rows)

    def release(self, nbytes: int) -> int:
        """Give up kept prefixes for at least so many bytes, or all of them; returns how many that were."""
        return self._prefixes.release(nbytes)

    def _say(self, deltas: list[Delta]) -> None:
        """What a step has made; who has an answer's end may ask again before the row has left."""
        if ended := sum(delta.finish_reason is not None for delta in deltas):
            self._prefiller.successors.ended(ended, time.perf_counter())
        self._send(deltas)

    def _send(self, deltas: list[Delta]) -> None:
        if deltas:
            self._emit(Step(deltas))

    def _abandon(self, reason: str) -> None:
        """A step has failed: nothing it touched can be trusted, so its rows end, and the loop goes on without them."""
        rows = [*self._decoding.abandon(), *self._prefiller.abandon()]
        self._send(self._fail(rows, reason))
        for row in rows:
            self.intake.release(row)
        self._bank.apply(None)
        try:
            mx.eval(self._loaded.layout.new().call(self._loaded.model, mx.array([[0]])))
        except Exception as error:
            self.fail_all(reason)
            raise EngineDied(f"the device does not compute any more: {error}") from error

    def _fail(self, rows: list[Row], reason: str) -> list[Delta]:
        deltas = [row.fail(reason) for row in rows if not row.done]
        self._decoding.counters.failed += len(deltas)
        return deltas

    # ------------------------------------------------------------- requests

    def submit(self, request: Generate) -> None:
        """Read a request, unless it would be refused anyway, and take it."""
        refusal = self.intake.refusal(request, self.limits)
        self.take(self.intake.prepare(request, self.limits) if refusal is None else Prepared(request, refusal))

    def take(self, prepared: Prepared) -> None:
        """Queue what was read, or emit its Rejected. A row whose grammar is not known yet is queued once it is."""
        try:
            if (counted := self.intake.take(prepared, self.limits)) is not None:
                self._send([counted])
        except RequestError as error:
            self._reject(prepared.id, error)
        except Exception as error:
            # Whatever one request trips over (a tokenizer's bug, say) is its own end, not the loop's.
            logger.exception("request could not be prepared", extra={"request": prepared.id})
            self._decoding.counters.failed += 1
            self._emit(Rejected(prepared.id, 500, f"the request could not be prepared: {error}"))

    def _reject(self, request_id: int, error: RequestError) -> None:
        self._emit(Rejected(request_id, error.status, error.message, error.param, error.code))

    @property
    def rows(self) -> list[Row]:
        """Every request that has not ended."""
        return [row for row in (*self._grammars.rows, *self._prefiller.rows, *self._batch.rows) if not row.done]

    def cancel(self, request_id: int) -> None:
        """Drop a request, if it has not ended: nothing more is sent for it, and it leaves before the next step."""
        self._cancel(row for row in self.rows if row.id == request_id)

    def cancel_all(self) -> None:
        """Drop every request: whoever sent them is gone."""
        self._cancel(self.rows)

    def _cancel(self, rows: Iterable[Row]) -> None:
        for row in rows:
            row.done = True
            self._decoding.counters.cancelled += 1

    def count_cancelled(self, number: int) -> None:
        """So many requests were dropped before they were submitted."""
        self._decoding.counters.cancelled += number

    def fail_all(self, reason: str) -> None:
        """End every request with an error."""
        self._send(self._fail(self.rows, reason))

    def trial(self, *requests: Generate) -> str | None:
        """Generate for nobody; returns why it failed, or None. Leaves no trace in counters and prefix cache."""
        return self._trial(requests, lambda: False)

    def _trial(self, requests: Sequence[Generate], enough: Callable[[], bool]) -> str | None:
        """The same of several, until it is `enough`."""
        answers: list[FromEngine] = []
        emit, self._emit = self._emit, answers.append
        try:
            for request in requests:
                self.submit(request)
            while self.busy:
                if enough():
                    self.cancel_all()
                self.step()
        finally:
            self._emit, self._decoding.counters = emit, Counters()
            for adapter in {request.adapter for request in requests}:
                self._prefixes.evict(adapter)
        failures = [answer.reason for answer in answers if isinstance(answer, Rejected)]
        deltas = [delta for answer in answers if isinstance(answer, Step) for delta in answer.deltas]
        failures += [delta.error for delta in deltas if delta.finish_reason == "error"]
        return failures[0] if failures else None

    def rehearse(self) -> str | None:
        """Have steps of every kind with a draft, for nobody, which compiles their kernels; as `trial`."""
        if self._speculation is None:
            return None
        # Where graphs are not kept, what was timed of calls does: it takes long, and there is nothing to be compiled.
        rows = self.limits.max_rows if self._loaded.batches and self._decoding.ahead else 1
        return rehearse(self._speculation, self.limits.num_draft_tokens, rows, self._trial)

    # ------------------------------------------------------------- adapters, limits, counters

    def load_adapter(self, source: AdapterSource) -> AdapterLoaded:
        """Make an adapter resident; one that is already stays as it is. Raises AdapterRefusal; nothing has changed."""
        return self._bank.load(source)

    def drop_adapter(self, key: str) -> None:
        """Take no new rows for an adapter; it is freed when the last that has it ends. Unknown keys do nothing."""
        self._bank.drop(key)
        self._prefixes.evict(key)

    @property
    def adapters(self) -> list[str]:
        """Keys that take new rows."""
        return self._bank.keys

    def configure(self, change: Configure) -> None:
        """Change limits in place. Rows above a lower `max_rows` finish."""
        self.limits = self.limits.changed(change)
        self._prefixes.resize(self.limits.prefix_cache_bytes)
        if change.memory_limit_bytes is not None:
            self.budget.granted = change.memory_limit_bytes
            self.room.stay_within()

    def stats(self) -> Stats:
        """The counters now."""
        return Stats(
            rows=len(self._batch.rows),
            prefilling=len(self._prefiller.active),
            waiting=self.intake.waiting,
            adapters=self.adapters,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            cache_bytes=mx.get_cache_memory(),
            prefix_cache_bytes=self._prefixes.nbytes,
            prompt_tokens_total=self._decoding.counters.prompt_tokens,
            cached_tokens_total=self._decoding.counters.cached_tokens,
            completion_tokens_total=self._decoding.counters.completion_tokens,
            steps_total=self._decoding.counters.steps,
            cancelled_total=self._decoding.counters.cancelled,
            failed_total=self._decoding.counters.failed,
            drafted_tokens_total=self._decoding.counters.drafted,
            accepted_tokens_total=self._decoding.counters.accepted,
            budget_bytes=self.budget.most,
            reserved_bytes=self.budget.held([*self._batch.rows, *self._prefiller.active], self._bank.nbytes),
        )
