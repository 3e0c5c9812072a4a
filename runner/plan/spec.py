"""What the manifest comes down to once names are resolved to files: specs, each with a content digest.

Everything here is frozen and compares by value. Two specs with the same `process_digest` can share an engine process;
whatever else differs between them is changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter of one deployment. `digest` is the hash of its files' contents, `scale` None for its own."""

    name: str
    path: Path
    digest: str
    scale: float | None = None

    @property
    def key(self) -> str:
        """Identity inside the engine: the contents and what changes their effect."""
        return self.digest if self.scale is None else f"{self.digest}@{self.scale:g}"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine can change in place. Bytes and tokens; 0 for the model's own."""

    max_rows: int = 32
    max_queue: int = 1024
    prefill_step_size: int = 512
    max_context: int = 0
    prefix_cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One deployment, resolved. `weights_digest` stands for the model folder's files.

    `generation` holds the manifest's defaults for request fields, by the request's names.
    """

    name: str
    source: str
    path: Path
    weights_digest: str
    weights_bytes: int
    aliases: tuple[str, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    default_adapter: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    limits: EngineLimits = EngineLimits()
    memory_limit_bytes: int = 0

    @property
    def process_digest(self) -> str:
        """Same value, same engine process."""
        return f"{self.weights_digest}-{self.memory_limit_bytes}"

    def adapter(self, name: str) -> AdapterSpec | None:
        """The adapter of that name, or None."""
        return next((a for a in self.adapters if a.name == name), None)


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """One `servers` entry. `api_keys` are secrets: they have no repr, and never reach a plan or the state folder."""

    name: str
    host: str
    port: int
    models: tuple[str, ...]
    apis: tuple[str, ...] = ("openai",)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024 * 1024

    @property
    def address(self) -> tuple[str, int]:
        """What a change of opens another socket."""
        return (self.host, self.port)


@dataclass(frozen=True, slots=True)
class Desired:
    """The whole of a manifest, resolved. `memory_limit_bytes` 0 means no limit was declared."""

    name: str
    models: tuple[ModelSpec, ...]
    listeners: tuple[ListenerSpec, ...]
    memory_limit_bytes: int = 0

    def model(self, name: str) -> ModelSpec | None:
        """The deployment of that name, or None."""
        return next((m for m in self.models if m.name == name), None)
