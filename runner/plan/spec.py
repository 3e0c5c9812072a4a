"""What the manifest comes down to once names are resolved to files: specs, each with a content digest.

Everything here is frozen and compares by value. Two specs with the same `process_digest` can share an engine process;
whatever else differs between them is changed in place.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runner.errors import Diagnostic
from runner.hub.jobs import Kind
from runner.inspect.memory import ModelMemory


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
class DraftSpec:
    """The draft model of one deployment. `digest` stands for its folder's files."""

    source: str
    path: Path
    digest: str
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class ChatTemplateSpec:
    """The file that is rendered in place of a model's own template. `digest` is of its content."""

    source: str
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine can change in place. Bytes and tokens; 0 for the model's own.

    `num_draft_tokens` is the most that the draft proposes at a time, 0 without a draft.
    """

    max_rows: int = 32
    max_queue: int = 1024
    prefill_step_size: int = 512
    max_context: int = 0
    prefix_cache_bytes: int = 0
    num_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """How an engine keeps keys and values: in `bits` each, with a scale for each `group_size` of them, for tokens at
    positions from `quantized_start` on."""

    bits: int
    group_size: int = 64
    quantized_start: int = 0

    @property
    def key(self) -> str:
        """Same value, same caches."""
        return f"{self.bits}.{self.group_size}" + (f".{self.quantized_start}" if self.quantized_start else "")


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """How a source is quantised before it is loaded. `layers` maps patterns of layers' paths to what is other for them
    (`bits`, `group_size`, `mode`), or to False: those stay as they are."""

    bits: int
    group_size: int
    mode: str = "affine"
    layers: dict[str, dict[str, Any] | bool] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Same value, same weights from the same source. The first pattern that matches decides: their order counts."""
        key = f"{self.mode}{self.bits}.{self.group_size}"
        if self.layers:
            rules = json.dumps([[pattern, rule] for pattern, rule in self.layers.items()], sort_keys=True)
            key += f".{hashlib.blake2b(rules.encode(), digest_size=8).hexdigest()}"
        return key


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One deployment, resolved. `weights_digest` stands for the model folder's files, `weights_bytes` counts the draft
    model's weights too, and is of the weights as they are loaded.

    `quantization` is None where the folder is loaded as it is, `dtype` what the model computes in, "" for its own.
    `load` is when an engine is started, `idle_timeout` after how many seconds without a request it is ended (0: never),
    and `priority` who comes first where memory is short: more before less.
    `kv_cache` is None where keys and values are kept as they are computed, `chat_template` where the model's own is
    rendered, and `tool_parser` empty where that tells how it writes tool calls. `generation` holds the manifest's
    defaults for request fields, by the request's names. `trust_remote_code`: the engine may run the Python code in the
    folder. `memory` is what it takes on this machine, term by term; it
    follows from the rest, and is not compared.
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
    draft: DraftSpec | None = None
    kv_cache: KVCacheSpec | None = None
    chat_template: ChatTemplateSpec | None = None
    tool_parser: str = ""
    quantization: QuantizationSpec | None = None
    dtype: str = ""
    load: Literal["eager", "on_demand"] = "eager"
    idle_timeout: float = 0.0
    priority: int = 0
    trust_remote_code: bool = False
    memory: ModelMemory = field(default=ModelMemory(), compare=False)

    @property
    def process_digest(self) -> str:
        """Same value, same engine process."""
        draft = "" if self.draft is None else f"-{self.draft.digest}{'-code' * self.draft.trust_remote_code}"
        kv = "" if self.kv_cache is None else f"-kv{self.kv_cache.key}"
        packing = "" if self.quantization is None else f"-q{self.quantization.key}"
        dtype = f"-{self.dtype}" if self.dtype else ""
        template = "" if self.chat_template is None else f"-t{self.chat_template.digest}"
        tools = f"-{self.tool_parser}" if self.tool_parser else ""
        code = "-code" * self.trust_remote_code
        return f"{self.weights_digest}{code}-{self.memory_limit_bytes}{draft}{kv}{packing}{dtype}{template}{tools}"

    def adapter(self, name: str) -> AdapterSpec | None:
        """The adapter of that name, or None."""
        return next((a for a in self.adapters if a.name == name), None)


@dataclass(frozen=True, slots=True)
class TlsSpec:
    """The certificate of a listener and its key; `digest` stands for what is in both files."""

    cert: Path
    key: Path
    digest: str


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """One `servers` entry. `api_keys` are secrets: they have no repr, and never reach a plan or the state folder.

    `api_key_sources` says of each where it came from: `file:PATH`, `variable:NAME`, or nothing for one that is written
    in the manifest.
    """

    name: str
    host: str
    port: int
    models: tuple[str, ...]
    apis: tuple[str, ...] = ("openai",)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024 * 1024
    api_key_sources: tuple[str, ...] = field(default=(), compare=False)
    tls: TlsSpec | None = None

    @property
    def address(self) -> tuple[str, int]:
        """What a change of opens another socket."""
        return (self.host, self.port)

    @property
    def url(self) -> str:
        """As clients write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Download:
    """A hub repository that is not in the cache, or not all of it. `bytes_left` None where nothing says how much.

    `targets` are the dotted paths of what needs it, as `kinds`; `place` is the first of them in the manifest. `code`:
    its Python files are needed, too.
    """

    repo: str
    revision: str
    bytes_left: int | None
    targets: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("model",)
    code: bool = False
    place: Diagnostic | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Desired:
    """The whole of a manifest, resolved. `memory_limit_bytes` 0 means no limit was declared.

    With `downloads` it can be planned but not be carried out: their digests and sizes are not known yet. `warnings` are
    what keeps nothing from running, and was found in the models' folders.
    """

    name: str
    models: tuple[ModelSpec, ...]
    listeners: tuple[ListenerSpec, ...]
    memory_limit_bytes: int = 0
    downloads: tuple[Download, ...] = ()
    warnings: tuple[Diagnostic, ...] = field(default=(), compare=False)

    def model(self, name: str) -> ModelSpec | None:
        """The deployment of that name, or None."""
        return next((m for m in self.models if m.name == name), None)
