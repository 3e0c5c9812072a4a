"""Downloads on the way to a running change: all that is missing at once, told as events and in conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from runner.control.compiled import Compiled
from runner.control.conditions import Wanted
from runner.control.events import EventLog
from runner.errors import Diagnostic, DownloadFailed
from runner.hub.download import Progress, Refused, download
from runner.hub.jobs import Failure, Job, Patience
from runner.manifest.names import model_of
from runner.plan.spec import Download


class Fetching:
    """Brings hub sources into the cache; `log` takes what the process that does it prints beside."""

    def __init__(self, events: EventLog, wanted: Wanted, log: Path, patience: Patience | None = None) -> None:
        self._events = events
        self._wanted = wanted
        self._log = log
        self._patience = patience

    async def __call__(self, compiled: Compiled, downloads: Sequence[Download]) -> None:
        """All of them, side by side. Raises DownloadFailed, with what is wrong at its place in the manifest."""
        models = {(d.repo, d.revision): _models(compiled.models, d.targets) for d in downloads}
        for (repo, revision), names in models.items():
            self._events.emit("downloading", repo=repo, revision=revision)
            self._wanted.not_downloaded(names, "Downloading", f"{repo} at {revision}")

        def told(progress: Progress) -> None:
            self._told(progress, models[progress.repo, progress.revision])

        jobs = [Job(d.repo, d.revision, d.kinds, code=d.code) for d in downloads]
        try:
            await download(jobs, told, token=compiled.hub_token, log=self._log, patience=self._patience)
        except Refused as refused:
            for (repo, revision), names in models.items():
                self._wanted.not_downloaded(names, "NotDownloaded", f"{repo} at {revision}")
            for failure in refused.failures:
                at = models.get((failure.repo, failure.revision), ())
                self._wanted.not_downloaded(at, "DownloadFailed", failure.message)
            raise download_failed(downloads, refused.failures) from None

    def _told(self, progress: Progress, models: Iterable[str]) -> None:
        tell_progress(self._events, progress)
        if progress.whole:
            return
        share = progress.done * 100 // progress.total if progress.total else 0
        message = f"{progress.repo} at {progress.revision}: {share} % of {progress.total / 2**20:.1f} MiB"
        self._wanted.not_downloaded(models, "Downloading", message)


def tell_progress(events: EventLog, progress: Progress) -> None:
    """How far a repository is, for whoever follows; that it has come is kept."""
    about = {"repo": progress.repo, "revision": progress.revision}
    if progress.whole:
        events.emit("downloaded", **about, commit=progress.commit, bytes=progress.total)
    else:
        events.tell("download_progress", **about, done_bytes=progress.done, total_bytes=progress.total)


def download_failed(downloads: Iterable[Download], failures: Iterable[Failure]) -> DownloadFailed:
    """What came to nothing, each at the first place in the manifest that asks for it."""
    places = {(d.repo, d.revision): d.place for d in downloads}
    found = [_at(places.get((failure.repo, failure.revision)), failure) for failure in failures]
    return DownloadFailed(found, passing=all(failure.passing for failure in failures))


def _at(place: Diagnostic | None, failure: Failure) -> Diagnostic:
    if place is None:
        return Diagnostic("hub", 0, 0, "", failure.message, failure.hint, code=failure.code)
    return place._replace(message=failure.message, hint=failure.hint, code=failure.code)


def _models(names: Iterable[str], targets: Sequence[str]) -> list[str]:
    known = list(names)
    found = {model_of(at, known) for at in targets}
    return [name for name in known if name in found]
