"""From a manifest to the desired state: names become folders, folders become digests, defaults are filled in.

Only reads: no network, no download. What is wrong is reported at its place in the manifest, all at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.manifest.checks import is_path
from runner.manifest.load import Loaded
from runner.manifest.models import Batching, Generation, KVCache, Model, Server
from runner.manifest.tree import KeyPath
from runner.plan.digests import BadFolder, DigestCache, FolderDigest, adapter_digest, model_digest
from runner.plan.hub import hub_cache, is_partial, snapshot
from runner.plan.memory import check_memory, memory_budget
from runner.plan.spec import AdapterSpec, Desired, EngineLimits, ListenerSpec, ModelSpec

__all__ = ["NotDownloaded", "resolve"]

PREFIX_CACHE_BYTES: Final = 256 * 2**20
"""Of a model whose manifest says nothing about it."""


def resolve(loaded: Loaded, *, machine_memory: int, cache: DigestCache) -> Desired:
    """What the manifest asks for, as specs; `machine_memory` is in bytes, `cache` lives as long as the runner.

    Raises NotDownloaded where all that is missing are hub sources, and ManifestError for anything else, such as
    folders that are no models, adapters that are half-written, or models that do not fit into memory.
    """
    resolution = _Resolution(loaded, cache, hub_cache(os.environ))
    models = tuple(filter(None, (resolution.model(name, m) for name, m in loaded.manifest.models.items())))
    if resolution.wrong:
        raise ManifestError(resolution.wrong)
    if resolution.missing:
        repo, revision = next(iter(resolution.missing))
        raise NotDownloaded(list(resolution.missing.values()), repo, revision)
    budget = memory_budget(loaded.manifest.memory, machine_memory)
    if found := check_memory(loaded, models, budget, resolution.adapter_bytes):
        raise ManifestError(found)
    return Desired(
        name=loaded.manifest.name,
        models=models,
        listeners=tuple(_listener(loaded, name, server) for name, server in loaded.manifest.servers.items()),
        memory_limit_bytes=budget.declared,
    )


class _Resolution:
    """One pass. `wrong` and `missing` (hub sources that are not in the cache) fill as sources are looked up."""

    def __init__(self, loaded: Loaded, cache: DigestCache, hub: Path) -> None:
        self.wrong: list[Diagnostic] = []
        self.missing: dict[tuple[str, str], Diagnostic] = {}
        self.adapter_bytes: dict[str, int] = {}
        self._loaded = loaded
        self._cache = cache
        self._hub = hub

    def model(self, name: str, model: Model) -> ModelSpec | None:
        path: KeyPath = ("models", name)
        found = self._digest(path, model.source, model.revision, model_digest)
        adapters = [self._adapter(name, adapter) for adapter in model.adapters]
        if found is None:
            return None
        folder, weights = found
        return ModelSpec(
            name=name,
            source=model.source,
            path=folder,
            weights_digest=weights.digest,
            weights_bytes=weights.weights_bytes,
            aliases=tuple(model.aliases),
            adapters=tuple(a for a in adapters if a is not None),
            default_adapter=model.default_adapter,
            generation=self._generation(model),
            limits=self._limits(model),
            memory_limit_bytes=model.memory_limit or 0,
        )

    def _adapter(self, model: str, name: str) -> AdapterSpec | None:
        entry = self._loaded.manifest.models[model].adapters[name]
        found = self._digest(("models", model, "adapters", name), entry.source, entry.revision, adapter_digest)
        if found is None:
            return None
        folder, files = found
        self.adapter_bytes[model] = self.adapter_bytes.get(model, 0) + files.weights_bytes
        return AdapterSpec(name=name, path=folder, digest=files.digest, scale=entry.scale)

    def _digest(
        self,
        path: KeyPath,
        source: str,
        revision: str | None,
        digest: Callable[[Path, DigestCache], FolderDigest],
    ) -> tuple[Path, FolderDigest] | None:
        """The folder of a source and its digest, or None with a diagnostic."""
        at = (*path, "source") if (*path, "source") in self._loaded.tree.values else path
        repo = self._hub_repo(source, revision)
        if repo is None:
            folder = self._folder(source)
            if folder is None:
                hint = "a path begins with ./ or ../, a Hugging Face repository is org/name"
                message = f'there is no folder "{source}" beside the manifest'
                self.wrong.append(self._loaded.at(at, message, hint, code="E601"))
                return None
        else:
            held = snapshot(self._hub, repo, revision or "main")
            if held is None:
                self._not_downloaded(at, repo, revision or "main")
                return None
            folder = held
        try:
            return folder, digest(folder, self._cache)
        except BadFolder as error:
            if repo is not None and error.incomplete and is_partial(self._hub, repo):
                self._not_downloaded(at, repo, revision or "main")
            else:
                self.wrong.append(self._loaded.at(at, error.message, error.hint, code=error.code))
            return None

    def _not_downloaded(self, at: KeyPath, repo: str, revision: str) -> None:
        message = f"{repo} ({revision}) is not in the hub's cache, or not all of it"
        found = self._loaded.at(at, message, "it has to be downloaded first", code="E604")
        self.missing.setdefault((repo, revision), found)

    def _folder(self, source: str) -> Path | None:
        """Where a path leads, or None where a bare name is no folder. Links are kept: what they point to may change."""
        folder = self._loaded.path.parent / Path(source).expanduser()
        if not source.startswith((".", "/", "~")) and not folder.is_dir():
            return None
        tidy = Path(os.path.normpath(folder))
        return tidy if tidy.exists() and tidy.samefile(folder) else folder

    def _hub_repo(self, source: str, revision: str | None) -> str | None:
        """The repository that a source names, or None where it is a folder. A revision makes it a repository."""
        is_folder = is_path(source) or (revision is None and self._folder(source) is not None)
        return None if is_folder else source

    def _generation(self, model: Model) -> dict[str, Any]:
        defaults = self._loaded.manifest.defaults
        return _given(defaults.generation if defaults else None) | _given(model.generation)

    def _limits(self, model: Model) -> EngineLimits:
        defaults = self._loaded.manifest.defaults
        cache = _given(defaults.kv_cache if defaults else None) | _given(model.kv_cache)
        batching = _given(defaults.batching if defaults else None) | _given(model.batching)
        return EngineLimits(
            **batching,
            max_context=cache.get("max_context", 0),
            prefix_cache_bytes=cache.get("prefix_cache", PREFIX_CACHE_BYTES),
        )


def _given(section: Generation | KVCache | Batching | None) -> dict[str, Any]:
    """What a section says, without what it leaves out."""
    return {} if section is None else {key: value for key, value in section if value is not None}


def _listener(loaded: Loaded, name: str, server: Server) -> ListenerSpec:
    keys = server.auth.api_keys if server.auth else None
    return ListenerSpec(
        name=name,
        host="127.0.0.1" if server.host == "localhost" else server.host,
        port=server.port,
        models=tuple(server.models if server.models is not None else loaded.manifest.models),
        apis=tuple(server.apis),
        api_keys=tuple(key.get_secret_value() for key in keys or ()),
        allow_origins=tuple(server.cors.allow_origins) if server.cors else (),
    )
