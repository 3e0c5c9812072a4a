"""What the hub has for some words, and which of it would fit here."""

from __future__ import annotations

import asyncio
import os

from runner.hub.cache import hub_cache
from runner.hub.download import search
from runner.hub.jobs import Patience
from runner.hub.store import stored
from runner.machine import this_machine
from runner.plan.verdict import Found, judge


async def search_hub(query: str, limit: int, token: str = "", patience: Patience | None = None) -> list[Found]:
    """At most `limit` repositories, those that are downloaded most first, asked by a process of its own. Raises
    Refused."""
    found = await search(query, limit=limit, token=token, patience=patience)
    here = await asyncio.to_thread(lambda: {held.repo for held in stored(hub_cache(os.environ))})
    machine = this_machine()
    return [Found(match, judge(match, machine), match.repo in here) for match in found]
