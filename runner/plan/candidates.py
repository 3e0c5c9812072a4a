"""Models that could be served here: what the hub's cache holds, and how much context and how many rows would fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.hub.cache import snapshot
from runner.hub.store import Stored, newest, stored
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.memory import ModelMemory
from runner.inspect.model import ModelFacts, read_model
from runner.inspect.remote_code import remote_code
from runner.plan.digests import model_digest

CONTEXTS: Final = (32768, 16384, 8192, 4096, 2048)
ROWS: Final = (32, 16, 8, 4, 2, 1)
_ENOUGH_ROWS: Final = 8
"""Fewer rows than this, and a shorter context is tried first."""

PREFIX_CACHE: Final = 256 * 2**20
_PREFILL_STEP: Final = 512


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A model. `revision` is its commit in the hub's cache, empty for a folder, and for what is not downloaded yet;
    then `facts` are None. `chats`: it has a chat template. `problem` says why it cannot be served."""

    source: str
    revision: str = ""
    facts: ModelFacts | None = None
    chats: bool = False
    problem: str = ""

    @property
    def stored(self) -> int:
        """Bytes of its weights, as they are stored; 0 where it is not here."""
        return sum(group.nbytes for group in self.facts.tensors) if self.facts is not None else 0

    def memory(self, context: int, rows: int, *, float32: bool) -> ModelMemory:
        """What it takes with so many rows of so many tokens."""
        assert self.facts is not None, "of a model that is here"
        limits = Limits(rows=rows, context=context, prefill_step=_PREFILL_STEP, prefix_cache=PREFIX_CACHE)
        return model_memory(self.facts, [], None, limits, float32=float32)


@dataclass(frozen=True, slots=True)
class Fit:
    """Limits under which a model fits, and what it takes with them at most."""

    context: int
    rows: int
    memory: ModelMemory


def fit(candidate: Candidate, budget: int, *, float32: bool) -> Fit | None:
    """The longest context, and the most rows of it, within `budget` bytes; None where not even one short row fits."""
    assert candidate.facts is not None, "of a model that is here"
    longest = candidate.facts.config.max_context
    contexts = [c for c in CONTEXTS if not longest or c < longest]
    if longest and longest <= CONTEXTS[0]:
        contexts.insert(0, longest)
    fits = []
    for context in contexts:
        for rows in ROWS:
            memory = candidate.memory(context, rows, float32=float32)
            if memory.most <= budget:
                fits.append(Fit(context, rows, memory))
                break
    enough = (f for f in fits if f.rows >= _ENOUGH_ROWS)
    return next(enough, max(fits, key=lambda f: f.rows, default=None))


def in_hub_cache(cache: Path, digests: DigestCache) -> list[Candidate]:
    """What was downloaded and has weights, those that can chat first, and of these the largest first."""
    by_repository: dict[str, list[Stored]] = {}
    for held in stored(cache):
        by_repository.setdefault(held.repo, []).append(held)
    found = [
        examine(one.folder, digests, source=repo, revision=one.commit)
        for repo, one in ((repo, newest(held)) for repo, held in by_repository.items())
        if any(one.folder.glob("model*.safetensors"))
    ]
    return sorted(found, key=lambda c: (bool(c.problem), not c.chats, -c.stored, c.source))


def named(source: str, cache: Path, digests: DigestCache) -> Candidate:
    """A folder, or a repository, in the cache or not."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return examine(folder, digests, source=source)
    held = snapshot(cache, source, "main")
    if held is None:
        return Candidate(source)
    return examine(held, digests, source=source, revision=held.name)


def examine(folder: Path, digests: DigestCache, *, source: str, revision: str = "") -> Candidate:
    """What a model's folder is good for."""
    try:
        facts = read_model(folder, model_digest(folder, digests).digest, digests)
        code = remote_code(folder, digests).needed
    except BadFolder as error:
        return Candidate(source, revision, problem=error.message.replace(f"{folder}", "it"))
    problem = f"needs leave to run its own code ({code[0]})" if code else _problem(facts)
    return Candidate(source, revision, facts, _chats(folder), problem)


def _problem(facts: ModelFacts) -> str:
    if facts.layout is None:
        return facts.unclear
    if not facts.layout.known:
        return f"models of type {facts.config.model_type!r} are not served"
    if facts.config.quantized_elsewhere:
        return f"quantised by {facts.config.quantized_elsewhere}, not by mlx"
    return ""


def _chats(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def fitting(candidates: list[Candidate], budget: int, *, float32: bool) -> Iterator[tuple[Candidate, Fit]]:
    """Those that can be served alone within `budget`."""
    for candidate in candidates:
        if candidate.facts is not None and not candidate.problem:
            found = fit(candidate, budget, float32=float32)
            if found is not None:
                yield candidate, found
