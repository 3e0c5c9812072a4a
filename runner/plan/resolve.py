"""From a manifest to the desired state: names become folders, folders become digests, defaults are filled in.

Only reads: no network, no download. What is wrong is reported at its place in the manifest, all at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.errors import Diagnostic, ManifestError, NotDownloaded
from runner.hub.cache import blobs_left, bytes_left, hub_cache, listed_files, listing_file, snapshot, snapshot_folder
from runner.hub.jobs import Kind
from runner.hub.needs import needed
from runner.machine import Machine, cpu_backend
from runner.manifest.drift import NO_CHANGES, Changes, taken_away
from runner.manifest.load import Loaded
from runner.manifest.models import Batching, Generation, KVCache, Model, Quantization
from runner.manifest.servers import Server, Tls
from runner.manifest.tree import KeyPath, Problem
from runner.plan.digests import BadFolder, DigestCache, FolderDigest, adapter_digest, file_version, model_digest
from runner.plan.examine import examine
from runner.plan.memory import memory_budget
from runner.plan.pinned import check_files, check_locked
from runner.plan.sources import Source, download, entries, source_at
from runner.plan.spec import (
    AdapterSpec,
    ChatTemplateSpec,
    Desired,
    Download,
    DraftSpec,
    EngineLimits,
    KVCacheSpec,
    ListenerSpec,
    ModelSpec,
    QuantizationSpec,
)
from runner.plan.tls import BadCertificate, read_tls

__all__ = ["NotDownloaded", "resolve", "survey"]

PREFIX_CACHE_BYTES: Final = 256 * 2**20
"""Of a model whose manifest says nothing about it."""

_REFERENCE: Final = r"\$\{(?:file:(?P<file>[^${}]+)|(?P<variable>\w+)(?::?\?[^${}]*)?)\}"
"""A scalar that is nothing but a reference to a secret: what is around one could be a part of the secret."""


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
    resolution = _Resolution(loaded, cache, hub_cache(os.environ), changes)
    served = {name: m for name, m in loaded.manifest.models.items() if name not in changes.unloaded}
    resolved = filter(None, (resolution.model(name, m) for name, m in served.items()))
    models, found = examine(loaded, tuple(resolved), resolution.absent, resolution.settings, machine, cache)
    for gone in cache.whole.keys() - resolution.found_folders:
        del cache.whole[gone]
    desired = Desired(
        name=loaded.manifest.name,
        models=models,
        listeners=tuple(resolution.listener(name, server) for name, server in loaded.manifest.servers.items()),
        memory_limit_bytes=memory_budget(loaded.manifest.memory, machine).declared,
        downloads=resolution.downloads(),
        warnings=tuple(d for d in found if d.severity == "warning"),
    )
    wrong = resolution.wrong + [d for d in found if d.severity == "error"]
    return Look(desired, wrong, [d.place for d in desired.downloads if d.place is not None])


class _Resolution:
    """One pass. `wrong` and `missing` fill as sources are looked up: the latter has hub repositories and revisions that
    are not in the cache, with the reason and what asks for each; `absent` has their folders."""

    def __init__(self, loaded: Loaded, cache: DigestCache, hub: Path, changes: Changes = NO_CHANGES) -> None:
        self.wrong: list[Diagnostic] = []
        self.absent: set[Path] = set()
        self.missing: dict[tuple[str, str], tuple[str, list[Source]]] = {}
        self.found_folders: set[Path] = set()
        self._loaded = loaded
        self._cache = cache
        self._hub = hub
        self._changes = changes

    def model(self, name: str, model: Model) -> ModelSpec | None:
        path: KeyPath = ("models", name)
        held = {path: source_at(self._loaded, path, entry) for path, entry in entries(name, model)}
        found = self._digest(held[path], model_digest)
        adapters = [self._adapter(held[(*path, "adapters", adapter)]) for adapter in self._adapters(name, model)]
        draft = None
        if model.draft is not None:
            draft = self._digest(held["models", name, "draft"], model_digest)
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
            **self._residence(model),
        )

    def listener(self, name: str, server: Server) -> ListenerSpec:
        spec = _listener(self._loaded, name, server, self._changes)
        if server.tls is None:
            return spec
        try:
            return replace(spec, tls=read_tls(*certificate(self._loaded, name, server.tls)))
        except BadCertificate as error:
            at = ("servers", name, "tls", error.file)
            self.wrong.append(self._loaded.at(at, error.message, error.hint, code="E511"))
            return spec

    def _chat_template(self, at: KeyPath, source: str | None) -> ChatTemplateSpec | None:
        """The file of a chat template: one of the manifest's inputs, so that an edit of it goes live."""
        if source is None:
            return None
        file = Path(os.path.normpath(self._loaded.folder(at) / Path(source).expanduser()))
        try:
            content = self._loaded.inputs.read(file)
            content.decode("utf-8")
        except (OSError, ValueError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeError) else "cannot be read"
            hint = "it is a file, relative to the manifest"
            self.wrong.append(self._loaded.at(at, f'the chat template "{source}" {reason}', hint, code="E612"))
            return None
        return ChatTemplateSpec(source, file, hashlib.blake2b(content, digest_size=16).hexdigest())

    def _adapters(self, name: str, model: Model) -> list[str]:
        """Those that are to be served."""
        taken = taken_away(self._changes, name)
        if model.default_adapter in taken:
            message = f'the default adapter "{model.default_adapter}" cannot be unloaded'
            hint = "choose another default_adapter in the manifest first"
            self.wrong.append(self._loaded.at(("models", name, "default_adapter"), message, hint, code="E302"))
        return [adapter for adapter in model.adapters if adapter not in taken]

    def _adapter(self, source: Source) -> AdapterSpec | None:
        _, model, _, name = map(str, source.path)
        entry = self._loaded.manifest.models[model].adapters[name]
        if source.found:
            found = self._found_adapter(source, source.folder or Path(source.text))
        else:
            found = self._digest(source, adapter_digest)
        if found is None:
            return None
        folder, files = found
        return AdapterSpec(name=name, path=folder, digest=files.digest, scale=entry.scale)

    def _found_adapter(self, source: Source, folder: Path) -> tuple[Path, FolderDigest] | None:
        """An adapter that nobody listed: where it is not whole it is left out, or stays what it was."""
        path = source.path
        self.found_folders.add(folder)
        try:
            digest = adapter_digest(folder, self._cache)
        except BadFolder as error:
            earlier: FolderDigest | None = self._cache.whole.get(folder) if error.incomplete else None
            if earlier is not None:
                hint = "the adapter is served as it was until it is whole again"
                self._loaded.warn(path, error.message, hint, code="W612")
                return folder, earlier
            if self._loaded.manifest.models[str(path[1])].default_adapter == path[3]:
                self.wrong.append(self._loaded.at(path, error.message, error.hint, code=error.code))
            else:
                self._loaded.warn(path, f"is left out: {error.message}", error.hint, code="W612")
            return None
        self._cache.whole[folder] = digest
        self._compare(check_locked(self._loaded, source))
        self._compare(check_files(self._loaded, source, folder, self._cache))
        return folder, digest

    def _digest(
        self, source: Source, digest: Callable[[Path, DigestCache], FolderDigest]
    ) -> tuple[Path, FolderDigest] | None:
        """The folder of a source and its digest, or None with a diagnostic."""
        self._compare(check_locked(self._loaded, source))
        folder = snapshot(self._hub, source.text, source.branch) if source.is_repository else source.folder
        if folder is None:
            if source.is_repository:
                return self._not_downloaded(source, "is not in the hub's cache")
            hint = "a path begins with ./ or ../, a Hugging Face repository is org/name"
            message = f'there is no folder "{source.text}" beside the manifest'
            self.wrong.append(self._loaded.at(source.at, message, hint, code="E601"))
            return None
        try:
            found = digest(folder, self._cache)
            if source.is_repository and (gone := _not_fetched(folder, source.kind, self._cache)):
                return self._not_downloaded(source, f"is in the hub's cache without {gone}")
            self._compare(check_files(self._loaded, source, folder, self._cache))
            return folder, found
        except BadFolder as error:
            if source.is_repository and error.incomplete:
                return self._not_downloaded(source, f"is not whole in the hub's cache: {error.message}")
            self.wrong.append(self._loaded.at(source.at, error.message, error.hint, code=error.code))
            return None

    def _compare(self, problems: Iterable[Problem]) -> None:
        """Note what the lock has against a source; where there is no lock, that is said once."""
        for problem in problems:
            found = self._loaded.at(problem.path, problem.message, problem.hint, code=problem.code)
            if problem.code.startswith("W"):
                self._loaded.tree.warnings.append(found._replace(severity="warning"))
            elif found not in self.wrong:
                self.wrong.append(found)

    def _not_downloaded(self, source: Source, why: str) -> tuple[Path, FolderDigest]:
        """A stand-in: what it will be is not known, only that it is none of what there is."""
        repo, revision = source.text, source.branch
        self.missing.setdefault((repo, revision), (f"{repo} ({revision}) {why}", []))[1].append(source)
        folder = snapshot_folder(self._hub, repo, revision)
        self.absent.add(folder)
        return folder, FolderDigest(f"{repo}@{revision}", 0)

    def downloads(self) -> tuple[Download, ...]:
        """What is missing, with how much of it there is still to come."""
        return tuple(
            download(self._loaded, *key, found, why, self._left(*key, found))
            for key, (why, found) in self.missing.items()
        )

    def _left(self, repo: str, revision: str, found: list[Source]) -> int | None:
        """Bytes that are to come: by the lock, which has all files, else by the weights' index where that is here."""
        files = {name: f for source in found if source.locked for name, f in source.locked.files.items()}
        if not files:
            return bytes_left(self._hub, repo, revision)
        return blobs_left(self._hub, repo, {f.digest.partition(":")[2]: f.size for f in files.values()})

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


def _not_fetched(folder: Path, kind: Kind, cache: DigestCache) -> str:
    """A file of a snapshot that serving takes and another tool did not bring along; empty where there is none."""
    version = file_version(listing_file(folder))
    listed = cache.remember("listing", version, listed_files) if version is not None else ()
    return next((name for name in needed(listed, (kind,)) if not (folder / name).exists()), "")


def _draft(model: Model, found: tuple[Path, FolderDigest] | None) -> DraftSpec | None:
    if model.draft is None or found is None:
        return None
    folder, weights = found
    return DraftSpec(model.draft.source, folder, weights.digest)


def _quantization(section: Quantization | None) -> QuantizationSpec | None:
    if section is None:
        return None
    from runner.plan.quantization import quantization_spec  # noqa: PLC0415 - few manifests need it, every edit waits

    return quantization_spec(section)


def _kv_cache(settings: Mapping[str, Any]) -> KVCacheSpec | None:
    if "bits" not in settings:
        return None
    return KVCacheSpec(**{key: settings[key] for key in ("bits", "group_size") if key in settings})


def _given(section: Generation | KVCache | Batching | None) -> dict[str, Any]:
    """What a section says, without what it leaves out."""
    return {} if section is None else {key: value for key, value in section if value is not None}


def _listener(loaded: Loaded, name: str, server: Server, changes: Changes) -> ListenerSpec:
    """All but its certificate."""
    at = ("servers", name, "auth", "api_keys")
    keys = server.auth.api_keys if server.auth else None
    models = tuple(server.models if server.models is not None else loaded.manifest.models)
    models += tuple(m for m, servers in changes.servers.items() if name in servers and m not in models)
    return ListenerSpec(
        name=name,
        host="127.0.0.1" if server.host == "localhost" else server.host,
        port=server.port,
        models=models,
        apis=tuple(server.apis),
        api_keys=tuple(key.get_secret_value() for key in keys or ()),
        api_key_sources=tuple(_source(loaded, (*at, index)) for index, _ in enumerate(keys or ())),
        allow_origins=tuple(server.cors.allow_origins) if server.cors else (),
    )


def certificate(loaded: Loaded, server: str, tls: Tls) -> tuple[Path, Path]:
    """Where the certificate of a server and its key are."""
    at = ("servers", server, "tls")
    cert, key = (
        loaded.folder((*at, name)) / Path(file).expanduser() for name, file in (("cert", tls.cert), ("key", tls.key))
    )
    return cert, key


def _source(loaded: Loaded, path: KeyPath) -> str:
    """Where a secret comes from, as in `ListenerSpec.api_key_sources`."""
    variables = loaded.tree.variables
    match = re.fullmatch(_REFERENCE, variables[path].text) if path in variables else None
    if match is None:
        return ""
    if match["variable"]:
        return f"variable:{match['variable']}"
    return f"file:{loaded.folder(path) / Path(match['file']).expanduser()}"
