"""Where each source of a manifest is on this machine: its folder and digest, or what is wrong with it, or missing.

Only reads: no network, no download.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from runner.errors import Diagnostic
from runner.hub.cache import blobs_left, bytes_left, listed_files, listing_file, snapshot, snapshot_folder
from runner.hub.needs import needed
from runner.inspect.remote_code import remote_code
from runner.manifest.load import Loaded
from runner.manifest.presence import is_file
from runner.manifest.tree import Problem
from runner.plan.digests import BadFolder, DigestCache, FolderDigest, adapter_digest, file_version, model_digest
from runner.plan.pinned import check_files, check_locked
from runner.plan.sources import Source, download
from runner.plan.spec import Download


class Lookup:
    """One look at the sources. `wrong` and `missing` fill as they are looked up: the latter has hub repositories and
    revisions that are not in the cache, with the reason and what asks for each; `absent` has their folders, and
    `found_folders` those of adapters that nobody listed."""

    def __init__(self, loaded: Loaded, cache: DigestCache, hub: Path) -> None:
        self.wrong: list[Diagnostic] = []
        self.missing: dict[tuple[str, str], tuple[str, list[Source]]] = {}
        self.absent: set[Path] = set()
        self.found_folders: set[Path] = set()
        self._loaded = loaded
        self._cache = cache
        self._hub = hub

    def model(self, source: Source) -> tuple[Path, FolderDigest] | None:
        """The folder of a model or a draft and its digest, or None with a diagnostic."""
        return self._digest(source, model_digest)

    def adapter(self, source: Source) -> tuple[Path, FolderDigest] | None:
        """The folder of an adapter and its digest, or None with a diagnostic."""
        if source.found:
            return self._found_adapter(source, source.folder or Path(source.text))
        return self._digest(source, adapter_digest)

    def downloads(self) -> tuple[Download, ...]:
        """What is missing, with how much of it there is still to come."""
        return tuple(
            download(self._loaded, *key, found, why, self._left(*key, found))
            for key, (why, found) in self.missing.items()
        )

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
            if source.is_repository and (gone := _not_fetched(folder, source, self._cache)):
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

    def _left(self, repo: str, revision: str, found: list[Source]) -> int | None:
        """Bytes that are to come: by the lock, which has all files, else by the weights' index where that is here."""
        files = {name: f for source in found if source.locked for name, f in source.locked.files.items()}
        if not files:
            return bytes_left(self._hub, repo, revision)
        return blobs_left(self._hub, repo, {f.digest.partition(":")[2]: f.size for f in files.values()})


def _not_fetched(folder: Path, source: Source, cache: DigestCache) -> str:
    """A file of a snapshot that serving takes and that did not come along: another tool left it out, or it is code,
    which was not wanted then. Empty where there is none. Raises BadFolder."""
    version = file_version(listing_file(folder))
    listed = cache.remember("listing", version, listed_files) if version is not None else ()
    wanted = needed(listed, (source.kind,), code=source.code)
    if source.code:
        wanted += remote_code(folder, cache).files
    return next((name for name in wanted if not is_file(folder / name)), "")
