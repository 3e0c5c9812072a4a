"""`/api/pull` of what the manifest does not serve: a repository of the hub, into its cache, with progress.

Only servers with the admin API do so: who else may talk to a port should not be able to fill the disk.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any, Final, NamedTuple

from runner.gateway.admin.control import CachedModel
from runner.gateway.backend import ModelCard
from runner.gateway.errors import describe, report
from runner.gateway.exchange import Exchange
from runner.gateway.ollama.answers import error_line
from runner.gateway.openai.shapes import encode_json
from runner.hub.download import Progress

_NAME: Final = re.compile(r"(?:hf\.co/|huggingface\.co/)?([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
_DEFAULT_TAG: Final = "latest"


class Wanted(NamedTuple):
    """A repository of the hub. `revision` is empty where the name has none."""

    repo: str
    revision: str


def repository(name: str) -> Wanted | None:
    """What a name means on the hub: `org/name`, `org/name:REVISION`, either behind `hf.co/`; None of any other."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    revision = match[2] or ""
    return Wanted(match[1], "" if revision == _DEFAULT_TAG else revision)


async def pulled(
    wanted: Wanted, first: Progress, rest: AsyncGenerator[Progress, None], exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """The download as lines; an error is a line with `error`, and the last."""
    yield _lines({"status": "pulling manifest"}, _step(first))
    try:
        async for progress in rest:
            yield _lines(_step(progress))
    except Exception as error:  # noqa: BLE001 - the status has been sent: only the stream is left to say it
        report(error, {"request_id": exchange.request_id, "route": exchange.route})
        exchange.status = describe(error)[0]
        yield error_line(error)
        return
    note = f"{wanted.repo} is in the hub's cache; an entry of the manifest serves it"
    yield _lines({"status": note}, {"status": "success"})


def _step(progress: Progress) -> dict[str, Any]:
    """Clients make a bar of each digest; this one is of the commit."""
    digest = f"sha1:{progress.commit}"
    return {
        "status": f"pulling {progress.commit[:12]}",
        "digest": digest,
        "total": progress.total,
        "completed": progress.done,
    }


def _lines(*steps: dict[str, Any]) -> bytes:
    return b"".join(encode_json(step) + b"\n" for step in steps)


def card_of(model: CachedModel) -> ModelCard:
    """A model that is here and not served, as one is listed that is."""
    return ModelCard(
        model.repo,
        model.since,
        model.repo,
        source=model.repo,
        size=model.size,
        digest=model.commit,
        architecture=model.architecture,
    )
