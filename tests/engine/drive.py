"""Drives an engine in this process, without its socket."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel
from runner.engine.loop import Engine
from runner.engine.sharing import Sharing
from runner.engine.speculative.speculation import Speculation
from runner.protocol import Delta, FromEngine, Generate, Rejected, Sampling, Step, TokenLogprob, Usage


@dataclass
class Answer:
    """What one request got."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rejected: Rejected | None = None
    ends: int = 0

    def add(self, delta: Delta) -> None:
        """Take one delta in."""
        assert self.ends == 0, "something came after the end"
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or []
        if delta.finish_reason is not None:
            self.finish_reason, self.usage, self.error = delta.finish_reason, delta.usage, delta.error
            self.ends += 1


class Driver:
    """An engine and the answers so far, by request id."""

    def __init__(
        self,
        loaded: LoadedModel,
        memory_limit: int = 0,
        speculation: Speculation | None = None,
        sharing: Sharing | None = None,
        **limits: Any,
    ) -> None:
        self.frames: list[FromEngine] = []
        self.answers: dict[int, Answer] = {}
        self._woken: SimpleQueue[None] = SimpleQueue()
        self.engine = Engine(
            loaded, Limits(**limits), self._receive, memory_limit, lambda: self._woken.put(None), speculation, sharing
        )

    def _receive(self, frame: FromEngine) -> None:
        self.frames.append(frame)
        if isinstance(frame, Rejected):
            answer = self.answers.setdefault(frame.id, Answer())
            answer.rejected = frame
            answer.ends += 1
        elif isinstance(frame, Step):
            for delta in frame.deltas:
                self.answers.setdefault(delta.id, Answer()).add(delta)

    def run(self, requests: Iterable[Generate], steps: int = 100_000) -> dict[int, Answer]:
        """Submit all at once, and step until nothing is left to do."""
        for request in requests:
            self.engine.submit(request)
        return self.drain(steps)

    def drain(self, steps: int = 100_000) -> dict[int, Answer]:
        """Step until nothing is left to do."""
        while self.engine.busy or self.engine.rows:
            assert steps, "the engine does not come to an end"
            if not self.engine.busy:
                self._woken.get(timeout=100)  # a grammar is being compiled
            self.engine.step()
            steps -= 1
        return self.answers

    def most_rows(self) -> int:
        """Step until nothing is left to do; returns how many rows there were at once, at most."""
        most = 0
        while self.engine.busy:
            self.engine.step()
            most = max(most, self.engine.stats().rows)
        return most

    @property
    def texts(self) -> list[str]:
        """What all requests got, by their ids."""
        return [answer.text for _, answer in sorted(self.answers.items())]

    def one(self, **fields: Any) -> Answer:
        """One request, alone."""
        request = generate(len(self.answers) + 1_000_000, **fields)
        return self.run([request])[request.id]


def active_memory() -> int:
    """Bytes in use once garbage is collected and the device has nothing left to do.

    What a collection lets go of can be what held other garbage, of tests before: so until nothing more goes. What
    another thread of theirs holds may go later still: compare with what was there before by <=, not by ==.
    """
    before, now = -1, 0
    while now != before:
        gc.collect()
        mx.synchronize()
        before, now = now, mx.get_active_memory()
    return now


def generate(request_id: int, **fields: Any) -> Generate:
    """A request; fields of Sampling are given beside those of Generate."""
    sampling = {name: fields.pop(name) for name in Sampling.__struct_fields__ if name in fields}
    return Generate(id=request_id, sampling=Sampling(**sampling), **fields)
