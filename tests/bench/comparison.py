"""Servers that take the same load in turn, what was measured of them so far, and the time that is left."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import msgspec

from runner.bench.figures import Level, median_level
from runner.bench.job import Target
from runner.bench.run import Settings, Subject, calibrate, measure
from runner.bench.workers import Workers
from tests.bench.record import Budget, Record, progress

SAMPLING: Final = {"temperature": 0.7, "top_p": 0.9}


class Comparison:
    """The servers that are up. `peer` is None where it does not take part; `replace` has a new one in its place."""

    def __init__(
        self,
        options: argparse.Namespace,
        workers: Workers,
        budget: Budget,
        us: Target,
        peer: Target | None = None,
        replace: Callable[[], None] | None = None,
    ) -> None:
        self.options = options
        self.workers = workers
        self.budget = budget
        self._replace = replace
        self._seed = int(time.time())
        self.us = calibrate(workers, us, self.settings(()))
        self.peer = None if peer is None else calibrate(workers, peer, self.settings(()))

    def section(self, name: str) -> tuple[Record, Budget]:
        """Where a section's figures go, and the time that it has."""
        return Record(self.options.record, name), self.budget.within(self.options.budgets.get(name))

    def settings(self, clients: tuple[int, ...], **more: Any) -> Settings:
        """What all sections have in common. Each gets a seed of its own, so that no prompt comes twice.

        The warm-up is like the level itself: shorter answers would leave what the later tokens of the first level need
        to be compiled within it.
        """
        self._seed += 1
        options = self.options
        per_client = {}
        if len(clients) == 1:
            per_client = {"requests": self.requests(clients[0]), "warm_up": max(options.least, clients[0])}
        chosen = {"repeat": options.repeat, "limit": options.limit, **per_client, **more}
        return Settings(
            clients=clients,
            prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            body=SAMPLING,
            seed=self._seed,
            timeout=options.limit,
            warm_up_tokens=options.max_tokens,
            **chosen,
        )

    def requests(self, clients: int) -> int:
        """How many a level has."""
        least: int = self.options.least
        return max(least, self.options.per_client * clients)

    def warm(self) -> None:
        """Both servers answer a few rows that come and go, before anything is measured."""
        for name, subject in (("mlx-run", self.us), (self.options.peer, self.peer)):
            if subject is not None:
                (runs,) = self.levels([subject], 8, Budget(None), repeat=1)
                progress(f"{name} is warm: {runs[0].tokens_per_second:,.0f} tokens/s of 8 clients")

    def both(self, clients: int, budget: Budget) -> list[list[Level]]:
        """Ours and the peer's repetitions. With more than `--turns` clients they do not take turns: the peer comes when
        ours is measured, without a warm-up but its first repetition, and is replaced if it does not finish. What it
        works on after its clients have left would else slow down ours."""
        assert self.peer is not None, "it takes part"
        if clients <= self.options.turns:
            return self.levels([self.us, self.peer], clients, budget)
        ours, theirs = self.levels([self.us], clients, budget), self.levels([self.peer], clients, budget, warm_up=0)
        if any(map(stuck, theirs[0])) and self._replace is not None:
            progress(f"{self.options.peer}'s server has not finished {clients} clients and is replaced")
            self._replace()
        return [ours[0], theirs[0][1:] or theirs[0]]

    def levels(self, subjects: list[Subject], clients: int, budget: Budget, **more: Any) -> list[list[Level]]:
        """Each subject's repetitions at one number of clients: as many as there is time for, and one at least. What did
        not finish is not repeated."""
        settings = self.settings((clients,), **more)
        found: list[list[Level]] = [[] for _ in subjects]
        fresh = [s._replace(load=msgspec.structs.replace(s.load, seed=settings.seed)) for s in subjects]
        longest, began = 0.0, time.monotonic()
        for measured in measure(self.workers, fresh, settings):
            found[measured.subject].append(measured.level)
            for text in troubles(measured.level):
                progress(f"{clients} clients, server {measured.subject}: {text}")
            if len({len(runs) for runs in found}) == 1:
                longest, began = max(longest, time.monotonic() - began), time.monotonic()
                if budget.left < longest or all(stuck(runs[-1]) for runs in found):
                    break
        return found


def stuck(level: Level) -> bool:
    """Whether a level's time was over before all was answered."""
    return bool(level.unfinished or "timeout" in level.failures)


def troubles(level: Level) -> Iterable[str]:
    """What did not go as it should."""
    for kind, failure in level.failures.items():
        yield f"{failure.count} × {kind} {failure.message}"
    if level.unfinished:
        yield f"{level.unfinished} of {level.requests + level.unfinished} not finished when the level's time was over"


def plain(runs: list[Level]) -> list[dict[str, Any]]:
    """Levels for a line of JSON."""
    return [msgspec.to_builtins(level) for level in runs]


def cells(name: str, runs: list[Level]) -> dict[str, str]:
    """The median of a server's repetitions as part of a table's row; times in ms."""
    level = median_level(runs)
    bad = [f"{level.failed} failed"] if level.failed else []
    bad += [f"{level.unfinished} unfinished"] if level.unfinished else []
    times = {"TTFT p50 / p99, ms": "-", "between tokens, ms": "-"}
    if level.ttft and level.inter_token:
        times["TTFT p50 / p99, ms"] = f"{level.ttft.p50 * 1e3:,.1f} / {level.ttft.p99 * 1e3:,.0f}"
        times["between tokens, ms"] = f"{level.inter_token.p50 * 1e3:,.2f}"
    answered = f"{level.requests - level.failed}" + (f" ({', '.join(bad)})" if bad else "")
    row = {"tokens/s": f"{level.tokens_per_second:,.0f}", **times, "answered": answered}
    return {f"{name}: {title}": text for title, text in row.items()}


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and options."""
    packages = ("mlx", "mlx-lm", "mlx-vlm", "mlx-cuda-13", "mlx-cuda-12", "mlx-cpu", "granian", "falcon", "mlx-run")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device(),
        "python": platform.python_version(),
        "versions": found,
        "options": {name: str(value) for name, value in vars(options).items()},
    }


def device() -> str:
    """What MLX runs on, asked in a process of its own so that this one holds nothing of a GPU."""
    code = "import mlx.core as mx; print(mx.default_device(), mx.device_info())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
