"""Has the hub's repositories fetched by a process of its own: who asks never imports the hub's library."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from runner.hub.cache import is_offline
from runner.hub.jobs import Failure, File, Job, Kind, Listing, Patience, request
from runner.processes import python_module


class Progress(NamedTuple):
    """How far a repository has come, in bytes. `commit` is what its revision means; it is in the cache once `whole`."""

    repo: str
    revision: str
    done: int
    total: int
    commit: str = ""
    whole: bool = False


class Refused(Exception):  # noqa: N818 - a condition
    """Some of what was asked for could not be had; nothing of that is visible in the cache."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__("; ".join(failure.message for failure in failures))
        self.failures = tuple(failures)


async def download(
    jobs: Sequence[Job],
    told: Callable[[Progress], None] = lambda progress: None,
    *,
    token: str = "",
    log: Path | None = None,
    patience: Patience | None = None,
) -> None:
    """Fill the hub's cache. Raises Refused. Cancelling ends it; what came so far is gone on from the next time.

    `told` hears of each repository when it is known how large it is, while it comes, and when it is whole. `token` is
    empty for the one that the hub's library finds; `log` takes what the process says beside, None: this one's stderr.
    """
    if is_offline(os.environ):
        raise Refused([_offline(job) for job in jobs])
    failures: list[Failure] = []
    commits: dict[tuple[str, str], str] = {}
    async for line in lines("runner.hub.fetch", request(list(jobs), token, patience or Patience()), log):
        if "failed" in line:
            failures.append(Failure(**line["failed"]))
        elif "done" in line:
            done = line["done"]
            total = done["total"]
            told(Progress(done["repo"], done["revision"], total, total, done["commit"], whole=True))
        else:
            here = line.get("started") or line["bytes"]
            key = (here["repo"], here["revision"])
            commit = commits.setdefault(key, here.get("commit", ""))
            told(Progress(*key, here["done"], here["total"], commit))
    if failures:
        raise Refused(failures)


async def listings(
    jobs: Sequence[Job], *, token: str = "", patience: Patience | None = None
) -> dict[tuple[str, str], Listing]:
    """What repositories hold now, by repository and revision; nothing is fetched. Raises Refused."""
    if is_offline(os.environ):
        raise Refused([_offline(job) for job in jobs])
    found: dict[tuple[str, str], Listing] = {}
    failures: list[Failure] = []
    async for line in lines("runner.hub.ask", request(list(jobs), token, patience or Patience())):
        if "failed" in line:
            failures.append(Failure(**line["failed"]))
        else:
            held = line["listing"]
            files = [File(*file) for file in held["files"]]
            found[held["repo"], held["revision"]] = Listing(held["commit"], tuple(held["kinds"]), files)
    if failures:
        raise Refused(failures)
    return found


class Match(NamedTuple):
    """A repository that a search found. `files` are what serving takes; `problem` is why it cannot be served, if so."""

    repo: str
    downloads: int
    likes: int
    gated: bool
    commit: str
    kinds: tuple[Kind, ...]
    files: tuple[File, ...]
    problem: str


async def search(query: str, *, limit: int = 20, token: str = "", patience: Patience | None = None) -> list[Match]:
    """Repositories that match some words, those that are downloaded most first. Raises Refused."""
    if is_offline(os.environ):
        raise Refused([_offline(Job(f"a search for {query!r}", ""))])
    asked = {"query": query, "limit": limit, "token": token, "patience": (patience or Patience())._asdict()}
    found: list[Match] = []
    async for line in lines("runner.hub.search", asked):
        if "failed" in line:
            raise Refused([Failure(**line["failed"])])
        match = line["found"]
        files = tuple(File(*file) for file in match["files"])
        found.append(Match(**{**match, "kinds": tuple(match["kinds"]), "files": files}))
    return found


async def lines(module: str, asked: dict[str, Any], log: Path | None = None) -> AsyncIterator[dict[str, Any]]:
    """What a process of this room answers. Raises Refused where it ends with neither an answer nor a reason."""
    with log.open("ab") if log is not None else nullcontext() as stream:
        process = await asyncio.create_subprocess_exec(
            *python_module(module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stream,
            limit=16 * 1024 * 1024,
            start_new_session=True,
        )
    assert process.stdin is not None, "it has pipes"
    assert process.stdout is not None, "it has pipes"
    failed = False
    try:
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        await process.stdin.drain()
        async for text in process.stdout:
            line: dict[str, Any] = json.loads(text)
            failed = failed or "failed" in line
            yield line
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code and not failed:
        where = f"{log} says why" if log is not None else "what it printed says why"
        jobs = [Job(**job) for job in asked.get("jobs", ())] or [Job("the hub", "")]
        message = f"the process that asks the hub ended with code {code}"
        raise Refused([Failure(job.repo, job.revision, "E804", message, where, passing=True) for job in jobs])


def _offline(job: Job) -> Failure:
    message = f"{job} cannot be had: HF_HUB_OFFLINE says that the hub is not to be asked"
    return Failure(job.repo, job.revision, "E801", message, "unset it, or fetch it elsewhere and bring the cache along")
