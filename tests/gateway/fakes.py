"""A directory and deployments that record what reaches them, and answer with what a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.errors import InvalidRequest, NotServed
from runner.gateway.admin.control import By, CachedModel, Outcome
from runner.gateway.backend import ModelCard, Route
from runner.hub.download import Progress
from runner.plan.scope import Scope
from runner.protocol import Delta, Generate, Stats, TokenLogprob, Usage

Item = list[Delta] | Exception | asyncio.Event
"""Deltas to yield, an error to raise, or an event to wait for."""


def text_script(*texts: str, reason: str = "stop", usage: Usage | None = None) -> list[Item]:
    """One batch a text, and the end in a batch of its own, as the engine sends it."""
    usage = usage or Usage(7, len(texts), 3)
    return [*([Delta(0, text, 1)] for text in texts), [Delta(0, "", 0, reason, usage)]]


@dataclass
class FakeDeployment:
    """Answers each request with the next script, or with the last one when they run out."""

    name: str = "chat"
    ready: bool = True
    stats: Stats | None = None
    scripts: list[Sequence[Item]] = field(default_factory=lambda: [text_script("Hello", " world")])
    requests: list[Generate] = field(default_factory=list)
    opened: int = 0
    closed: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def loaded(self) -> bool:
        return self.ready

    async def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        self.opened += 1
        self.changed.set()
        try:
            for item in script:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.closed += 1
            self.changed.set()

    async def until(self, condition: str, *, deadline: float = 60.0) -> None:
        """Waits until `condition`, over this object's own names, holds."""
        async with asyncio.timeout(deadline):
            while not eval(condition, {}, vars(self)):  # the conditions are the tests' own
                self.changed.clear()
                await self.changed.wait()


@dataclass
class FakeDirectory:
    """One model `chat` with the adapters `pirate` and `shout`; `generation` are its manifest defaults."""

    deployment: FakeDeployment = field(default_factory=FakeDeployment)
    adapters: tuple[str, ...] = ("pirate", "shout")
    generation: dict[str, Any] = field(default_factory=dict)
    lookups: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def cards(self, listener: str) -> list[ModelCard]:
        ready = self.deployment.ready
        cards = [ModelCard(name, 1700000000, "chat", None, ready, loaded=ready) for name in ("chat", "org/gpt-4o")]
        return cards + [
            ModelCard(f"chat:{name}", 1700000000, "chat", name, ready, loaded=ready) for name in self.adapters
        ]

    def resolve(self, listener: str, model: str | None, adapter_name: str | None) -> Route:
        self.lookups.append((listener, model, adapter_name))
        name, _, from_id = (model or "chat").partition(":")
        if from_id and adapter_name and from_id != adapter_name:
            raise InvalidRequest("`model` and `adapter_name` name different adapters", param="adapter_name")
        adapter = from_id or adapter_name
        if name not in {"chat", "org/gpt-4o"} or (adapter and adapter not in self.adapters):
            raise NotServed(f"`{model}` is not served here", param="model", code="model_not_found")
        key = f"key-{adapter}" if adapter else ""
        return Route(self.deployment, "chat", adapter, key, f"fp_{adapter or 'base'}", self.generation)

    def deployments(self, listener: str) -> list[FakeDeployment]:
        return [self.deployment]


@dataclass
class FakeControl:
    """Records what is asked of it, and answers with `outcome`, an error to raise among them."""

    outcome: Outcome | Exception = field(
        default_factory=lambda: Outcome({"actions": []}, 3, 0.25, ("models.x loaded",))
    )
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    at_once: bool = True

    def status(self) -> dict[str, Any]:
        return {"name": "dev"}

    async def available(self) -> dict[str, Any]:
        return {"models": [{"source": "org/a"}], "notes": []}

    async def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        self.asked.append(("search", query, limit))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return [{"repo": "org/a", "fits": True}]

    async def cached(self) -> list[CachedModel]:
        return [CachedModel("org/a", "a" * 40, 7, 1700000000, "llama"), CachedModel("org/gpt-4o", "b" * 40, 7, 1, "")]

    async def pull(self, repo: str, revision: str) -> AsyncGenerator[Progress, None]:
        """Half, and then all, unless the outcome is an error: `at_once`, or halfway."""
        self.asked.append(("pull", repo, revision))
        try:
            if isinstance(self.outcome, Exception) and self.at_once:
                raise self.outcome
            yield Progress(repo, revision, 5, 10, "c" * 40)
            if isinstance(self.outcome, Exception):
                raise self.outcome
            yield Progress(repo, revision, 10, 10, "c" * 40, whole=True)
        finally:
            self.asked.append(("pull ended",))

    async def plan(self, scope: Scope) -> Outcome:
        return self._answer("plan", scope)

    async def apply(self, scope: Scope, by: By, seconds: float | None) -> Outcome:
        return self._answer("apply", scope, by, seconds)

    async def load_model(self, name: str, entry: Mapping[str, Any] | None, servers: tuple[str, ...], by: By) -> Outcome:
        return self._answer("load_model", name, entry, servers, by)

    async def unload_model(self, name: str, by: By) -> Outcome:
        return self._answer("unload_model", name, by)

    async def load_adapter(self, model: str, name: str, entry: Mapping[str, Any] | None, by: By) -> Outcome:
        return self._answer("load_adapter", model, name, entry, by)

    async def unload_adapter(self, model: str, name: str, by: By) -> Outcome:
        return self._answer("unload_adapter", model, name, by)

    def _answer(self, *asked: Any) -> Outcome:
        self.asked.append(asked)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def logprob(token: str, value: float, *top: tuple[str, float]) -> TokenLogprob:
    """A token's logprob with its alternatives."""
    return TokenLogprob(token, value, list(token.encode()), [(t, v, list(t.encode())) for t, v in top])
