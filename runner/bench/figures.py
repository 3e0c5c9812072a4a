"""Measurements → figures."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from runner.bench.job import Outcome, Report


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution, in seconds. The p-th percentile is the smallest value that p % of the values do not exceed."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """How often a kind of error came, and what the first of them said."""

    count: int
    message: str


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One server at one number of clients.

    `tokens` are the server's own count where it gave one, and stream events with content where not; `counted_by` says
    which. `unfinished` requests are neither answered nor failed: the level's time was over. `seconds` run from the
    first request's start to the last answer's end, or the last token of an unfinished one. `tpot` is, per request, the
    time after its first token over the tokens after it; `inter_token` is each gap between two events.
    """

    clients: int
    requests: int
    failed: int
    unfinished: int
    failures: dict[str, Failure]
    seconds: float
    tokens: int
    counted_by: Literal["usage", "events", "both", "none"]
    tokens_per_second: float
    requests_per_second: float
    prompt_tokens: float | None
    cached_tokens: float | None
    completion_tokens: float | None
    ttft: Spread | None
    inter_token: Spread | None
    tpot: Spread | None
    request: Spread | None
    not_streamed: int
    interrupted: bool
    client_cpu: float
    """Seconds of CPU that the load generator took, per second and process; near 1 it is the bottleneck."""


def spread(values: Sequence[float] | array[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    ordered = sorted(values)

    def percentile(p: int) -> float:
        return ordered[max(0, -(-p * len(ordered) // 100) - 1)]

    return Spread(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        p50=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        max=ordered[-1],
    )


def level_of(clients: int, reports: Sequence[Report]) -> Level:
    """What the workers measured together at one number of clients."""
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    gaps = array("d")
    for report in reports:
        gaps.frombytes(report.gaps)
    interrupted = not reports or any(report.stopped for report in reports)
    good = [o for o in outcomes if not o.error]
    bad = [o for o in outcomes if o.error and o.error not in ("interrupted", "unfinished")]
    began = min((o.began for o in outcomes), default=0.0)
    seconds = max((o.ended for o in outcomes), default=0.0) - began
    tokens, source = _count(outcomes)
    return Level(
        clients=clients,
        requests=len(good) + len(bad),
        failed=len(bad),
        unfinished=sum(o.error == "unfinished" for o in outcomes) + sum(r.left for r in reports),
        failures=_failures(bad),
        seconds=seconds,
        tokens=tokens,
        counted_by=source,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        prompt_tokens=_mean(o.prompt_tokens for o in good),
        cached_tokens=_mean(o.cached_tokens for o in good),
        completion_tokens=_mean(o.completion_tokens for o in good),
        ttft=spread([o.ttft for o in outcomes if o.ttft is not None]),
        inter_token=spread(gaps),
        tpot=spread([value for o in good if (value := _tpot(o)) is not None]),
        request=spread([o.ended - o.began for o in good]),
        not_streamed=sum(not o.streamed for o in good),
        interrupted=interrupted,
        client_cpu=max((r.cpu_seconds for r in reports), default=0.0) / seconds if seconds else 0.0,
    )


def median_level(runs: Sequence[Level]) -> Level:
    """Of several runs of a level the one with the median of tokens a second (of two, the slower)."""
    ordered = sorted(runs, key=lambda run: run.tokens_per_second)
    return ordered[(len(ordered) - 1) // 2]


def _count(outcomes: Sequence[Outcome]) -> tuple[int, Literal["usage", "events", "both", "none"]]:
    """Tokens that arrived, also those of requests that failed later, and who counted them."""
    told = [o.completion_tokens for o in outcomes if o.completion_tokens is not None]
    chunks = [o.chunks for o in outcomes if o.completion_tokens is None and o.chunks]
    match bool(told), bool(chunks):
        case True, False:
            source: Literal["usage", "events", "both", "none"] = "usage"
        case False, True:
            source = "events"
        case True, True:
            source = "both"
        case _:
            source = "none"
    return sum(told) + sum(chunks), source


def _failures(bad: Sequence[Outcome]) -> dict[str, Failure]:
    counts = Counter(o.error for o in bad)
    return {
        kind: Failure(count=count, message=next((o.message for o in bad if o.error == kind and o.message), ""))
        for kind, count in counts.most_common()
    }


def _tpot(outcome: Outcome) -> float | None:
    tokens = outcome.completion_tokens or outcome.chunks
    if outcome.ttft is None or tokens < 2:
        return None
    return (outcome.ended - outcome.began - outcome.ttft) / (tokens - 1)


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
