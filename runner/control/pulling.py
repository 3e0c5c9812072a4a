"""A repository into the hub's cache because a client of the admin API asks for it, and what is in that cache."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from runner.control.events import EventLog
from runner.control.fetching import tell_progress
from runner.errors import CannotBeDone, HubFailed, NotServed, RequestError, Unavailable
from runner.gateway.admin.control import CachedModel
from runner.hub.cache import hub_cache
from runner.hub.download import Progress, Refused, download
from runner.hub.jobs import Failure, Job, Kind, Patience
from runner.hub.needs import lacking
from runner.hub.store import Stored, newest, stored

_OFFLINE: Final = "E801"
_NOT_THERE: Final = ("E803", "E807")
_NO_ROOM: Final = "E805"

_A_MODEL: Final[tuple[Kind, ...]] = ("model",)


async def pull(
    job: Job, events: EventLog, *, token: str, log: Path, patience: Patience | None = None
) -> AsyncGenerator[Progress, None]:
    """How far it is, until it is whole. Closing the generator ends the download, to be gone on from. Raises
    RequestError."""
    told: asyncio.Queue[Progress | None] = asyncio.Queue()
    events.emit("downloading", repo=job.repo, revision=job.revision)
    work = asyncio.create_task(download([job], told.put_nowait, token=token, log=log, patience=patience))
    work.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (progress := await told.get()) is not None:
            tell_progress(events, progress)
            yield progress
        await work
    except Refused as refused:
        raise hub_error(refused.failures[0]) from None
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, Refused):
            await work


def hub_error(failure: Failure) -> RequestError:
    """Why the hub gave nothing, for a request that needs it."""
    message = f"{failure.message}; {failure.hint}" if failure.hint else failure.message
    if failure.code == _OFFLINE:
        return Unavailable(message, retry_after=60.0, code=failure.code)
    if failure.code in _NOT_THERE:
        return NotServed(message, code=failure.code)
    if failure.code == _NO_ROOM:
        return CannotBeDone(message, code=failure.code)
    return HubFailed(message, code=failure.code)


def cached_models() -> list[CachedModel]:
    """What is in the hub's cache and has what a model takes, a commit of each repository."""
    held: dict[str, list[Stored]] = {}
    for one in stored(hub_cache(os.environ)):
        held.setdefault(one.repo, []).append(one)
    found = (newest(commits) for commits in held.values())
    return [_cached(one) for one in found if not lacking([path.name for path in one.folder.iterdir()], _A_MODEL)]


def _cached(one: Stored) -> CachedModel:
    try:
        kind = json.loads((one.folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    since = int(one.folder.stat().st_mtime)
    return CachedModel(one.repo, one.commit, one.size, since, kind if isinstance(kind, str) else "")
