"""What running rows notice of a request that joins them."""

from __future__ import annotations

import asyncio

import msgspec

from runner.bench.clients import Clients
from runner.bench.figures import Spread, spread
from runner.bench.job import Job, Load, Target

_LOOK = 0.002
"""Seconds between two looks at whether all rows run."""


class Joined(msgspec.Struct):
    """The running rows' inter-token times while others joined, and how many did."""

    gaps: Spread
    joined: int


def join(target: Target, load: Load, *, rows: int, tokens: int, by: int) -> Joined:
    """Starts `rows` long answers; once all run, `by` clients ask for short ones, one after the other, until one of the
    long answers has ended. Raises RuntimeError when a long answer fails, or is too short for all to run together."""
    return asyncio.run(_join(target, load, rows, tokens, by))


async def _join(target: Target, load: Load, rows: int, tokens: int, by: int) -> Joined:
    long = msgspec.structs.replace(load, max_tokens=tokens)
    running = Clients(Job(target=target, load=long, clients=rows, first=0, end=rows))
    task = asyncio.create_task(running.run())
    while not (len(running.outcomes) == rows and all(o.ttft is not None for o in running.outcomes)):
        if any(o.error for o in running.outcomes):
            raise RuntimeError(next(o.message for o in running.outcomes if o.error))
        await asyncio.sleep(_LOOK)
    del running.gaps[:]
    short = msgspec.structs.replace(load, max_tokens=2)
    joining = Clients(Job(target=target, load=short, clients=by, first=rows, end=1_000_000))
    joiners = asyncio.create_task(joining.run()) if by else None
    while not any(o.ended for o in running.outcomes):
        await asyncio.sleep(_LOOK)
    gaps = spread(running.gaps)
    joining.stop()
    running.stop()
    await task
    if joiners is not None:
        await joiners
    if gaps is None:
        raise RuntimeError(f"the first of the answers ended before the last began: {tokens} tokens are too few")
    return Joined(gaps=gaps, joined=sum(not o.error for o in joining.outcomes))
