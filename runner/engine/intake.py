"""Requests on their way to the queue: read by any thread, taken by the engine's."""

from __future__ import annotations

import time

from runner.engine.adapters.bank import AdapterBank
from runner.engine.admission import Admission
from runner.engine.grammar.service import Grammars
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel
from runner.engine.prefill import Prefiller
from runner.engine.prepared import Prepared
from runner.engine.room import Room
from runner.engine.row import Row
from runner.errors import NotServed, RequestError, Unavailable
from runner.protocol import Delta, Generate


class Intake:
    """What stands before the queue of `prefiller`, and of `grammars` for a row whose grammar is not known yet.

    While `draining`, requests are refused. Every method is for the engine's thread, but for `refusal` and `prepare`.
    """

    def __init__(
        self, loaded: LoadedModel, bank: AdapterBank, grammars: Grammars, prefiller: Prefiller, room: Room
    ) -> None:
        self.draining = False
        self._longest = loaded.max_context
        self._admission = Admission(loaded.tokenizer, loaded.chat, loaded.vocabulary, loaded.conventions)
        self._bank = bank
        self._grammars = grammars
        self._prefiller = prefiller
        self._room = room

    @property
    def waiting(self) -> int:
        """Requests that are in a queue."""
        return len(self._prefiller.waiting) + len(self._grammars.rows)

    def context(self, limits: Limits) -> int:
        """Tokens of prompt and answer together: the declared limit within the model's own, 0 for none."""
        return min((limit for limit in (limits.max_context, self._longest) if limit), default=0)

    def refusal(self, request: Generate, limits: Limits) -> RequestError | None:
        """Why a request is refused whatever it says, where it is.

        Any thread may ask, to spare itself the reading: what holds is what `take` finds.
        """
        if request.count_only:
            return None
        if self.draining:
            return Unavailable("the engine is shutting down", code="shutting_down")
        waiting = self.waiting
        if waiting >= limits.max_queue:
            return Unavailable(f"{waiting} requests are waiting already", code="queue_full")
        return None

    def prepare(self, request: Generate, limits: Limits) -> Prepared:
        """Read a request to which `limits` apply. Any thread may, while others do, and the engine steps."""
        return self._admission.prepared(request, self.context(limits))

    def take(self, prepared: Prepared, limits: Limits) -> Delta | None:
        """Queue what was read; or the answer, where that is there already: it has only been counted.

        Raises RequestError for what is wrong with it, and whatever else the reading ended with.
        """
        found = self.refusal(prepared.request, limits) or prepared.found
        if isinstance(found, Exception):
            raise found
        if isinstance(found, Delta):
            return found
        self._admit(found, prepared.request.adapter)
        self._prefiller.successors.arrived(time.perf_counter())
        if self._has_grammar(found):
            self._prefiller.waiting.append(found)
        return None

    def _admit(self, row: Row, adapter: str) -> None:
        self._room.require(row)
        if adapter:
            row.adapter = self._bank.acquire(adapter)
            if row.adapter is None:
                raise NotServed("the adapter is not loaded", param="adapter_name", code="adapter_not_found")

    def _has_grammar(self, row: Row) -> bool:
        if row.asked is None:
            return True
        try:
            return self._grammars.give(row, row.asked)
        except Exception:
            self.release(row)
            raise

    def release(self, row: Row) -> None:
        """A row has ended, or is not to begin: its adapter has a row less."""
        adapter, row.adapter = row.adapter, None  # once, though a step fails in which it has left
        if adapter is not None:
            self._bank.release(adapter)
