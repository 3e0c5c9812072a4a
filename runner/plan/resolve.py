"""From a manifest to the desired state: names become folders, folders become digests, defaults are filled in.

Only reads: no network, no download. What is wrong is reported at its place in the manifest, all at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.hub.cache import hub_cache
from runner.machine import Machine, cpu_backend
from runner.manifest.drift import NO_CHANGES, Changes, taken_away
from runner.manifest.generation import Generation
from runner.manifest.load import Loaded
from runner.manifest.models import Batching, KVCache, Model
from runner.manifest.presence import from_home
from runner.manifest.quantization import Quantization
from runner.manifest.tree import KeyPath
from runner.plan.digests import DigestCache, FolderDigest
from runner.plan.examine import examine
from runner.plan.listeners import listener_spec
from runner.plan.lookup import Lookup
from runner.plan.memory import memory_budget
from runner.plan.sources import Source, entries, source_at
from runner.plan.spec import (
    AdapterSpec,
    ChatTemplateSpec,
    Desired,
    DraftSpec,
    EngineLimits,
    KVCacheSpec,
    ModelSpec,
    QuantizationSpec,
)

__all__ = ["NotDownloaded", "resolve", "survey"]

PREFIX_CACHE_BYTES: Final = 256 * 2**20
"""Of a model whose manifest says nothing about it."""


def resolve(loaded: Loaded, *, machine_memory: int, cache: DigestCache, float32: bool | None = None) -> Desired:
    """What the manifest asks for, as specs; `machine_memory` is in bytes, `cache` lives as long as the runner.

    `float32` is whether models compute in it, None to look at this machine. Raises NotDownloaded where all that is
    missing are hub sources, and ManifestError for anything else, such as folders that are no models, adapters that are
    half-written, or models that do not fit into memory.
    """
    desired, missing = survey(loaded, machine_memory=machine_memory, cache=cache, float32=float32)
    if missing:
        raise NotDownloaded(missing, desired.downloads[0].repo, desired.downloads[0].revision)
    return desired


def survey(
    loaded: Loaded,
    *,
    machine_memory: int,
    cache: DigestCache,
    float32: bool | None = None,
    changes: Changes = NO_CHANGES,
) -> tuple[Desired, list[Diagnostic]]:
    """As `resolve`, but `changes` are what `loaded` was read with, and hub sources that are not in the cache are in
    `downloads`, and have stand-ins for what is not known of them; for each there is a diagnostic too. Raises
    ManifestError for anything else."""
    machine = Machine(machine_memory, cpu_backend() if float32 is None else float32)
    found = look(loaded, machine, cache, changes)
    if found.wrong:
        raise ManifestError(found.wrong)
    return found.desired, found.missing


class Look(NamedTuple):
    """What is known of a manifest's files: `desired` without the models whose own folder is wrong, what is `wrong`, and
    for each hub source that is `missing` in the cache the first place that asks for it."""

    desired: Desired
    wrong: list[Diagnostic]
    missing: list[Diagnostic]


def look(loaded: Loaded, machine: Machine, cache: DigestCache, changes: Changes = NO_CHANGES) -> Look:
    """Everything at once, whatever is wrong with it; but models that rest, which take nothing."""
    lookup = Lookup(loaded, cache, hub_cache(os.environ))
    resolution = _Resolution(loaded, lookup, changes)
    served = {name: m for name, m in loaded.manifest.models.items() if name not in changes.unloaded}
    resolved = filter(None, (resolution.model(name, m) for name, m in served.items()))
    models, found = examine(loaded, tuple(resolved), lookup.absent, resolution.settings, machine, cache)
    for gone in cache.whole.keys() - lookup.found_folders:
        del cache.whole[gone]
    listeners = [listener_spec(loaded, name, server, changes) for name, server in loaded.manifest.servers.items()]
    desired = Desired(
        name=loaded.manifest.name,
        models=models,
        listeners=tuple(spec for spec, _ in listeners),
        memory_limit_bytes=memory_budget(loaded.manifest.memory, machine).declared,
        downloads=lookup.downloads(),
        warnings=tuple(d for d in found if d.severity == "warning"),
    )
    wrong = lookup.wrong + [d for _, d in listeners if d is not None] + [d for d in found if d.severity == "error"]
    return Look(desired, wrong, [d.place for d in desired.downloads if d.place is not None])


class _Resolution:
    """Models of one manifest as specs. What is wrong is added to what `lookup` has found to be wrong."""

    def __init__(self, loaded: Loaded, lookup: Lookup, changes: Changes) -> None:
        self._lookup = lookup
        self._loaded = loaded
        self._changes = changes

    def model(self, name: str, model: Model) -> ModelSpec | None:
        path: KeyPath = ("models", name)
        held = {path: source_at(self._loaded, path, entry) for path, entry in entries(name, model)}
        found = self._lookup.model(held[path])
        adapters = [self._adapter(held[(*path, "adapters", adapter)]) for adapter in self._adapters(name, model)]
        draft = None
        if model.draft is not None:
            draft = self._lookup.model(held["models", name, "draft"])
        if found is None or (model.draft is not None and draft is None):
            return None
        folder, weights = found
        return ModelSpec(
            name=name,
            source=model.source,
            path=folder,
            weights_digest=weights.digest,
            weights_bytes=weights.weights_bytes + (draft[1].weights_bytes if draft else 0),
            aliases=tuple(model.aliases),
            adapters=tuple(a for a in adapters if a is not None),
            default_adapter=model.default_adapter,
            generation=self._generation(model),
            limits=self._limits(name, model),
            memory_limit_bytes=model.memory_limit or 0,
            draft=_draft(model, draft),
            kv_cache=_kv_cache(self.settings(name)["kv_cache"]),
            chat_template=self._chat_template((*path, "chat_template"), model.chat_template),
            tool_parser=model.tool_parser or "",
            quantization=_quantization(model.quantization),
            dtype=model.dtype or "",
            trust_remote_code=model.trust_remote_code,
            **self._residence(model),
        )

    def _chat_template(self, at: KeyPath, source: str | None) -> ChatTemplateSpec | None:
        """The file of a chat template: one of the manifest's inputs, so that an edit of it goes live."""
        if source is None:
            return None
        file = Path(os.path.normpath(self._loaded.folder(at) / from_home(source)))
        try:
            content = self._loaded.inputs.read(file)
            content.decode("utf-8")
        except (OSError, ValueError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeError) else "cannot be read"
            hint = "it is a file, relative to the manifest"
            self._lookup.wrong.append(self._loaded.at(at, f'the chat template "{source}" {reason}', hint, code="E612"))
            return None
        return ChatTemplateSpec(source, file, hashlib.blake2b(content, digest_size=16).hexdigest())

    def _adapters(self, name: str, model: Model) -> list[str]:
        """Those that are to be served."""
        taken = taken_away(self._changes, name)
        if model.default_adapter in taken:
            message = f'the default adapter "{model.default_adapter}" cannot be unloaded'
            hint = "choose another default_adapter in the manifest first"
            self._lookup.wrong.append(self._loaded.at(("models", name, "default_adapter"), message, hint, code="E302"))
        return [adapter for adapter in model.adapters if adapter not in taken]

    def _adapter(self, source: Source) -> AdapterSpec | None:
        _, model, _, name = map(str, source.path)
        entry = self._loaded.manifest.models[model].adapters[name]
        found = self._lookup.adapter(source)
        if found is None:
            return None
        folder, files = found
        return AdapterSpec(name=name, path=folder, digest=files.digest, scale=entry.scale)

    def _generation(self, model: Model) -> dict[str, Any]:
        defaults = self._loaded.manifest.defaults
        return _given(defaults.generation if defaults else None) | _given(model.generation)

    def _residence(self, model: Model) -> dict[str, Any]:
        """When it is loaded, and when it goes."""
        defaults = self._loaded.manifest.defaults
        load = model.load or (defaults.load if defaults else None)
        timeout = model.idle_timeout or (defaults.idle_timeout if defaults else None)
        return {"load": load or "eager", "idle_timeout": timeout or 0.0, "priority": model.priority}

    def settings(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """A model's sections `kv_cache` and `batching`, with what the defaults say of them."""
        model, defaults = self._loaded.manifest.models[name], self._loaded.manifest.defaults
        return {
            "kv_cache": _given(defaults.kv_cache if defaults else None) | _given(model.kv_cache),
            "batching": _given(defaults.batching if defaults else None) | _given(model.batching),
        }

    def _limits(self, name: str, model: Model) -> EngineLimits:
        settings = self.settings(name)
        cache, batching = settings["kv_cache"], settings["batching"]
        return EngineLimits(
            **batching,
            max_context=cache.get("max_context", 0),
            prefix_cache_bytes=cache.get("prefix_cache", PREFIX_CACHE_BYTES),
            num_draft_tokens=model.draft.num_draft_tokens if model.draft else 0,
        )


def _draft(model: Model, found: tuple[Path, FolderDigest] | None) -> DraftSpec | None:
    if model.draft is None or found is None:
        return None
    folder, weights = found
    return DraftSpec(model.draft.source, folder, weights.digest, model.draft.trust_remote_code)


def _quantization(section: Quantization | None) -> QuantizationSpec | None:
    if section is None:
        return None
    from runner.plan.quantization import quantization_spec  # noqa: PLC0415 - few manifests need it, every edit waits

    return quantization_spec(section)


def _kv_cache(settings: Mapping[str, Any]) -> KVCacheSpec | None:
    if "bits" not in settings:
        return None
    keys = ("bits", "group_size", "quantized_start")
    return KVCacheSpec(**{key: settings[key] for key in keys if key in settings})


def _given(section: Generation | KVCache | Batching | None) -> dict[str, Any]:
    """What a section says, without what it leaves out."""
    return {} if section is None else {key: value for key, value in section if value is not None}
