"""`python -m runner.hub.fetch`: brings repositories into the hub's cache, several files at a time.

Reads a request (`runner.hub.jobs`) as the first line of its input, and ends when that is closed: then nobody waits any
more. It answers in lines of JSON: `{"started": …}` and `{"done": …}` once a repository, `{"bytes": …}` while they come,
`{"failed": …}` where one comes to nothing. A snapshot and its ref are there only once all files of a repository are.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from huggingface_hub import logging

from runner.hub.cache import hub_cache, link_snapshot, repository
from runner.hub.client import Client, Failed
from runner.hub.jobs import Failure, File, Job, Listing, read_request
from runner.hub.listing import listing
from runner.hub.store import in_use
from runner.hub.transfer import PARTIAL, disk_failure, fetch_blob, matches

_AT_ONCE: Final = 6
"""Files, of all repositories together."""

_TOLD_EVERY: Final = 0.25
"""Seconds."""

_lock = threading.Lock()


def say(**line: Any) -> None:
    """Print one line."""
    with _lock:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


class Fetching:
    """One repository on its way. `total` and `done` are bytes of the files that it takes, with what was there."""

    def __init__(self, client: Client, job: Job, cache: Path, found: Listing) -> None:
        self.job = job
        self.found = found
        self.folder = repository(cache, job.repo)
        self.blobs = self.folder / "blobs"
        self.total = sum(file.size for file in found.files)
        self.done = 0
        self.failure: Failure | None = None
        self._client = client
        self._cache = cache
        self._began = time.monotonic()
        self._counting = threading.Lock()
        self._left = [file for file in found.files if not self._is_there(file)]

    def _is_there(self, file: File) -> bool:
        blob = self.blobs / file.blob
        try:
            if blob.stat().st_size == file.size and (not self.job.verify or matches(blob, file)):
                self.done += file.size
                return True
            blob.unlink()  # cut by something that did not care
        except FileNotFoundError:
            pass
        return False

    @property
    def needed(self) -> int:
        """Bytes of disk that it still takes."""
        return sum(file.size - _size(self.blobs / f"{file.blob}{PARTIAL}") for file in self._left)

    @property
    def names(self) -> dict[str, Any]:
        """What its lines begin with."""
        return {"repo": self.job.repo, "revision": self.job.revision}

    def start(self, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Fetch, the large files first."""
        say(started={**self.names, "commit": self.found.commit, "total": self.total, "done": self.done})
        self.blobs.mkdir(parents=True, exist_ok=True)
        return [pool.submit(self._fetch, file) for file in sorted(self._left, key=lambda file: -file.size)]

    def _fetch(self, file: File) -> None:
        if self.failure is not None:
            return
        try:
            fetch_blob(self._client, self.job, self.found.commit, file, self.blobs, self._tally)
        except Failed as error:
            self.failure = error.failure
        except OSError as error:
            self.failure = disk_failure(self.job, error, self._cache)

    def _tally(self, count: int) -> None:
        with self._counting:
            self.done += count

    def finish(self) -> None:
        """Make it visible, now that it is whole."""
        if self.failure is None:
            try:
                files = {file.name: file.blob for file in self.found.files}
                link_snapshot(self.folder, self.found.commit, self.job.revision, files)
            except OSError as error:
                self.failure = disk_failure(self.job, error, self._cache)
        if self.failure is not None:
            say(failed=self.failure._asdict())
            return
        seconds = round(time.monotonic() - self._began, 3)
        say(done={**self.names, "commit": self.found.commit, "total": self.total, "seconds": seconds})


def fetch(jobs: list[Job], client: Client, cache: Path) -> bool:
    """Fetch what is asked for. Whether all of it is there now."""
    with ThreadPoolExecutor(_AT_ONCE) as pool, ExitStack() as held:
        works, failures = _look(jobs, client, cache, pool, held)
        failures += _no_room(works, cache)
        for failure in failures:
            say(failed=failure._asdict())
        if failures:
            return False  # all or nothing is asked for: what could be had would only take room
        _carry_out(works, pool)
    return all(work.failure is None for work in works)


def _look(
    jobs: list[Job], client: Client, cache: Path, pool: ThreadPoolExecutor, held: ExitStack
) -> tuple[list[Fetching], list[Failure]]:
    """What there is to fetch, of repositories that nobody removes of while they are `held`."""
    works: list[Fetching] = []
    failures: list[Failure] = []
    asked = [(job, pool.submit(listing, client, job)) for job in jobs]
    for job, answer in asked:
        try:
            found = answer.result()
            held.enter_context(in_use(cache, job.repo, alone=False))
            works.append(Fetching(client, job, cache, found))
        except Failed as error:
            failures.append(error.failure)
        except OSError as error:
            failures.append(disk_failure(job, error, cache))
    return works, failures


def _carry_out(works: list[Fetching], pool: ThreadPoolExecutor) -> None:
    todo = {id(work): (work, set(work.start(pool))) for work in works}
    told: dict[int, int] = {}
    while todo:
        every = {future for _, futures in todo.values() for future in futures}
        wait(every, timeout=_TOLD_EVERY, return_when=FIRST_EXCEPTION)
        for key, (work, futures) in list(todo.items()):
            if told.get(key) != work.done:
                told[key] = work.done
                say(bytes={**work.names, "done": work.done, "total": work.total})
            if all(future.done() for future in futures):
                for future in futures:
                    future.result()
                work.finish()
                del todo[key]


def _no_room(works: list[Fetching], cache: Path) -> list[Failure]:
    """A failure for each repository where the disk cannot take all of them."""
    needed = sum(work.needed for work in works)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    to_come = f"{_shown(needed)} are to come, and {cache} has room for {_shown(free)}"
    hint = f"make {_shown(needed - free)} of room (`mlx-run models prune`), or set HF_HOME to a larger disk"
    return [
        Failure(
            *work.job[:2],
            "E805",
            f"{work.job} cannot be had: {to_come}",
            hint,
        )
        for work in works
        if work.needed
    ]


def _shown(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _end_with_the_one_who_asked() -> None:
    """Input that ends means that nobody waits any more."""

    def listen() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # not the buffer, whose lock an ending interpreter wants
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


def main() -> int:
    """0 when everything is in the cache."""
    jobs, token, patience = read_request(json.loads(sys.stdin.buffer.readline()))
    _end_with_the_one_who_asked()
    logging.set_verbosity_error()  # what matters is said in lines
    return 0 if fetch(jobs, Client(token, patience), hub_cache(os.environ)) else 1


if __name__ == "__main__":
    sys.exit(main())
