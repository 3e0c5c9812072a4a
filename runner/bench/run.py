"""A whole run: look at each server, find the prompt length, then warm up and measure level by level.

Servers take turns within a level, and the order turns with each repetition, so that a machine that gets slower or
hotter does so for both.
"""

from __future__ import annotations

import http.client
import json
import ssl
import statistics
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from runner.bench.figures import Level, level_of
from runner.bench.job import Job, Load, Outcome, Report, Target
from runner.bench.workers import Workers, processes_for
from runner.errors import RunnerError

WORDS_PER_TOKEN: Final = 0.75
"""Assumed where a server does not say how many tokens a prompt has."""

WARM_UP_TOKENS: Final = 16

_LOOK_TIMEOUT: Final = 10.0
_NUMBERS_A_LEVEL: Final = 10_000_000
"""Each level's requests are numbered from a multiple of this, so that no prompt comes twice in a run."""

_PROBES: Final = 4
"""Prompts of each length that are tried."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. With `duration` seconds a level has no number of requests; `repeat` runs each level again.

    A level that takes longer than `limit` seconds ends there, with what has been answered until then.
    """

    clients: tuple[int, ...] = (1, 8, 32, 128)
    requests: int | None = None
    duration: float | None = None
    limit: float | None = None
    prompt_tokens: int = 256
    shared_prefix: int = 0
    max_tokens: int = 128
    spread: float = 0.0
    body: dict[str, Any] = {}
    adapter_field: str = "adapter_name"
    seed: int = 0
    timeout: float = 300.0
    repeat: int = 1
    warm_up: int | None = None
    warm_up_tokens: int = WARM_UP_TOKENS
    processes: int | None = None

    def requests_at(self, clients: int) -> int:
        """How many requests a level has: two a client and at least eight, unless it is said."""
        return self.requests or max(8, 2 * clients)

    def processes_at(self, clients: int) -> int:
        """How many processes its clients take."""
        return self.processes or processes_for(clients)


class Subject(NamedTuple):
    """A server, and the requests that it gets. `calibrated` says whether it told the prompts' lengths."""

    target: Target
    load: Load
    calibrated: bool


class Measured(NamedTuple):
    """One level of one server, the `repetition`th time."""

    subject: int
    repetition: int
    level: Level


def find_model(target: Target) -> Target:
    """The target with the first model that it lists; as it is where it lists none. Raises RunnerError: no answer."""
    if target.model:
        return target
    status, body = _get(target, "/models")
    if status in (401, 403):
        raise RunnerError(f"{target.url} wants an API key ({status})", hint="Say --api-key, or $MLX_RUN_API_KEY.")
    if status != 200:
        return target
    try:
        models = json.loads(body)["data"]
        return msgspec.structs.replace(target, model=str(models[0]["id"]))
    except (ValueError, KeyError, IndexError, TypeError):
        return target


def _get(target: Target, path: str) -> tuple[int, bytes]:
    if target.tls:
        context = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            target.host, target.port, timeout=_LOOK_TIMEOUT, context=context
        )
    else:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=_LOOK_TIMEOUT)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        connection.request("GET", f"{target.base}{path}", headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise RunnerError(f"{target.url} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()


def calibrate(workers: Workers, target: Target, settings: Settings, adapters: tuple[str, ...] = ()) -> Subject:
    """Finds out how many words make `prompt_tokens`, by the server's own count, and whether it gives usage in streams.

    Raises RunnerError: the server refuses these requests.
    """
    load = Load(
        words=8,
        max_tokens=1,
        body=settings.body,
        adapters=adapters,
        adapter_field=settings.adapter_field,
        seed=settings.seed,
        timeout=settings.timeout,
    )
    probe = _Probe(workers, target, load)
    words, calibrated = _words(probe, settings.prompt_tokens)
    shared = round(words * min(settings.shared_prefix / settings.prompt_tokens, 1))
    load = msgspec.structs.replace(
        load, words=words - shared, shared_words=shared, max_tokens=settings.max_tokens, spread=settings.spread
    )
    return Subject(probe.target, load, calibrated)


class _Probe:
    """A few short requests that tell how a server counts."""

    def __init__(self, workers: Workers, target: Target, load: Load) -> None:
        self.target = target
        self._workers = workers
        self._load = load
        self._asked = 0

    def tokens(self, words: int) -> float | None:
        """Mean prompt tokens of prompts of so many words, None when the server does not tell.

        Raises RunnerError when a request fails.
        """
        outcomes = self._ask(words)
        if self.target.usage and any(o.error and "stream_options" in o.message for o in outcomes):
            self.target = msgspec.structs.replace(self.target, usage=False)
            outcomes = self._ask(words)
        for outcome in outcomes:
            if outcome.error:
                said = f": {outcome.message}" if outcome.message else ""
                raise RunnerError(f"{self.target.url} failed on a first request, {outcome.error}{said}")
        told = [o.prompt_tokens for o in outcomes if o.prompt_tokens is not None]
        return statistics.fmean(told) if told else None

    def _ask(self, words: int) -> list[Outcome]:
        first = _NUMBERS_A_LEVEL + self._asked
        self._asked += _PROBES
        load = msgspec.structs.replace(self._load, words=words)
        job = Job(target=self.target, load=load, clients=1, first=first, end=first + _PROBES)
        reports = self._workers.run(job, 1)
        if not reports or reports[0].stopped:
            raise KeyboardInterrupt
        return reports[0].outcomes


def _words(probe: _Probe, wanted: int) -> tuple[int, bool]:
    """Words for `wanted` tokens, and whether the server told. Prompts of two lengths give a word's tokens."""
    short, longer = 8, max(24, wanted // 8)
    first, second = probe.tokens(short), probe.tokens(longer)
    if first is None or second is None or second <= first:
        return max(1, round(wanted * WORDS_PER_TOKEN)), False
    per_word = (second - first) / (longer - short)
    return max(1, round(longer + (wanted - second) / per_word)), True


def measure(workers: Workers, subjects: list[Subject], settings: Settings) -> Iterator[Measured]:
    """Yields each level as it ends; an interrupted one is the last."""
    block = 1  # the probes' numbers
    for clients in settings.clients:
        for subject in subjects:
            block += 1
            if not _warm_up(workers, subject, settings, clients, block):
                return
        for repetition in range(settings.repeat):
            order = list(enumerate(subjects))
            for index, subject in order if repetition % 2 == 0 else reversed(order):
                block += 1
                reports = _run_level(workers, subject, settings, clients, block)
                level = level_of(clients, reports)
                yield Measured(index, repetition, level)
                if level.interrupted:
                    return


def _warm_up(workers: Workers, subject: Subject, settings: Settings, clients: int, block: int) -> bool:
    """Short answers for as many clients, so that what a server does once a batch size is done. False: interrupted."""
    requests = clients if settings.warm_up is None else settings.warm_up
    if not requests:
        return True
    load = msgspec.structs.replace(subject.load, max_tokens=min(settings.warm_up_tokens, subject.load.max_tokens))
    first = block * _NUMBERS_A_LEVEL
    job = Job(
        target=subject.target,
        load=load,
        clients=min(clients, requests),
        first=first,
        end=first + requests,
        limit=settings.limit,
    )
    reports = workers.run(job, settings.processes_at(clients))
    return bool(reports) and not any(report.stopped for report in reports)


def _run_level(workers: Workers, subject: Subject, settings: Settings, clients: int, block: int) -> list[Report]:
    first = block * _NUMBERS_A_LEVEL
    requests = _NUMBERS_A_LEVEL if settings.duration is not None else settings.requests_at(clients)
    job = Job(
        target=subject.target,
        load=subject.load,
        clients=clients,
        first=first,
        end=first + requests,
        duration=settings.duration,
        limit=settings.limit,
    )
    return workers.run(job, settings.processes_at(clients))
