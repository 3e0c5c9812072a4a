"""What `mlx-run bench` prints: a row a level as it ends, and everything as JSON."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec

from runner.bench.figures import Level, Spread, median_level
from runner.bench.run import Measured, Settings, Subject

FORMAT: Final = 1
"""The version of the JSON form."""

_BUSY: Final = 0.8
"""CPU of the load generator, as a share of a core, above which its figures are its own."""


class Table:
    """Prints rows as they come. With two servers they are A and B, and a row of ratios follows each pair."""

    def __init__(self, subjects: Sequence[Subject], settings: Settings) -> None:
        self._letters = "AB"[: len(subjects)] if len(subjects) > 1 else " "
        self._settings = settings
        self._runs: dict[int, list[list[Level]]] = {}
        self._notes: list[str] = []
        for letter, subject in zip(self._letters, subjects, strict=True):
            print(f"{letter} {subject.target.url}  {subject.target.model or '(its own model)'}".strip())
        print(_describe(settings, subjects[0]))
        for letter, subject in zip(self._letters, subjects, strict=True):
            if not subject.calibrated:
                print(f"{letter} does not say how long prompts are: their length is estimated".strip())
        print()
        print(f"{'':3} {'':7} {'':8} {'':6} {'':9}  {'TTFT, ms':^26}  {'inter-token, ms':^26}")
        columns = f"{'p50':>8} {'p90':>8} {'p99':>8}"
        print(f"{'':3} {'clients':>7} {'requests':>8} {'failed':>6} {'tokens/s':>9}  {columns}  {columns}", flush=True)

    def add(self, measured: Measured) -> None:
        """Takes a measurement; prints a level's rows once all repetitions on all servers are there."""
        level = measured.level
        runs = self._runs.setdefault(level.clients, [[] for _ in self._letters])
        runs[measured.subject].append(level)
        self._note(self._letters[measured.subject], level)
        if all(len(own) == self._settings.repeat for own in runs):
            self._print(self._runs.pop(level.clients))

    def _print(self, runs: list[list[Level]]) -> None:
        medians = [median_level(own) if own else None for own in runs]
        for letter, level in zip(self._letters, medians, strict=True):
            if level is not None and level.seconds:
                print(_row(letter, level), flush=True)
        match medians:
            case [Level() as a, Level() as b]:
                print(_ratio_row(a, b), flush=True)

    def close(self) -> None:
        """The rest of an interrupted run, and what there is to say about all of it."""
        for runs in self._runs.values():
            self._print(runs)
        if self._notes:
            print()
        for note in dict.fromkeys(self._notes):
            print(note)

    def _note(self, letter: str, level: Level) -> None:
        place = f"{letter} {level.clients} client{'s' if level.clients > 1 else ''}".strip()
        for kind, failure in level.failures.items():
            said = f": {failure.message}" if failure.message else ""
            self._notes.append(f"{place}: {failure.count} failed with {kind}{said}")
        if level.unfinished:
            self._notes.append(f"{place}: {level.unfinished} not finished when the level's time was over")
        if level.interrupted:
            self._notes.append(f"{place}: interrupted after {level.seconds:.1f} s")
        if level.not_streamed:
            self._notes.append(f"{place}: {level.not_streamed} answers came in one piece, not as a stream")
        if level.counted_by in ("events", "both"):
            whose = "some" if level.counted_by == "both" else "all"
            self._notes.append(f"{place}: {whose} tokens are counted as events with content, the server gave no usage")
        if level.cached_tokens and not self._settings.shared_prefix and level.prompt_tokens:
            share = level.cached_tokens / level.prompt_tokens
            if share > 0.1:
                self._notes.append(f"{place}: {share:.0%} of the prompts came from the server's prefix cache")
        if level.client_cpu > _BUSY:
            self._notes.append(f"{place}: the load generator itself was busy ({level.client_cpu:.0%} of a core)")


def _describe(settings: Settings, subject: Subject) -> str:
    parts = [f"prompts of {settings.prompt_tokens} tokens"]
    if settings.shared_prefix:
        parts[0] += f" ({settings.shared_prefix} shared)"
    parts.append(f"{settings.max_tokens} new" + (f", give or take {settings.spread:.0%}" if settings.spread else ""))
    parts += [f"{name} {value}" for name, value in settings.body.items()]
    if subject.load.adapters:
        parts.append(f"adapters {', '.join(name or 'none' for name in subject.load.adapters)}")
    if settings.repeat > 1:
        parts.append(f"median of {settings.repeat}")
    return f"{', '.join(parts)}, seed {settings.seed}"


def _row(letter: str, level: Level) -> str:
    counts = f"{level.clients:>7} {level.requests:>8} {level.failed:>6} {level.tokens_per_second:>9,.1f}"
    return f"{letter:3} {counts}  {_milliseconds(level.ttft)}  {_milliseconds(level.inter_token)}"


def _milliseconds(values: Spread | None) -> str:
    if values is None:
        return f"{'-':>8} {'-':>8} {'-':>8}"
    return " ".join(f"{value * 1e3:>8,.1f}" for value in (values.p50, values.p90, values.p99))


def _ratio_row(a: Level, b: Level) -> str:
    counts = f"{a.clients:>7} {'':>8} {'':>6} {_ratio(a.tokens_per_second, b.tokens_per_second):>9}"
    return f"A/B {counts}  {_ratios(a.ttft, b.ttft)}  {_ratios(a.inter_token, b.inter_token)}"


def _ratios(a: Spread | None, b: Spread | None) -> str:
    if a is None or b is None:
        return _milliseconds(None)
    return " ".join(f"{_ratio(x, y):>8}" for x, y in ((a.p50, b.p50), (a.p90, b.p90), (a.p99, b.p99)))


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}×" if b else "-"


def as_json(subjects: Sequence[Subject], settings: Settings, found: Sequence[Measured]) -> dict[str, Any]:
    """Everything that was measured. `ratios` are of the first server over the second, of medians over repetitions."""
    servers = []
    for index, subject in enumerate(subjects):
        runs = [m.level for m in found if m.subject == index]
        servers.append(
            {
                "url": subject.target.url,
                "model": subject.target.model,
                "adapters": list(subject.load.adapters),
                "prompt_length_calibrated": subject.calibrated,
                "levels": [msgspec.to_builtins(level) for level in runs],
            }
        )
    return {
        "format": FORMAT,
        "mlx_run": version("mlx-run"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "settings": msgspec.to_builtins(settings),
        "servers": servers,
        "ratios": ratios(found) if len(subjects) == 2 else [],
    }


def ratios(found: Sequence[Measured]) -> list[dict[str, float]]:
    """A row a level that both servers have completed."""
    rows = []
    for clients in dict.fromkeys(m.level.clients for m in found):
        pair = [[m.level for m in found if m.level.clients == clients and m.subject == index] for index in (0, 1)]
        if not all(pair):
            continue
        a, b = (median_level(runs) for runs in pair)
        row: dict[str, float] = {"clients": clients}
        if b.tokens_per_second:
            row["tokens_per_second"] = a.tokens_per_second / b.tokens_per_second
        if a.ttft and b.ttft:
            row["ttft_p50"] = a.ttft.p50 / b.ttft.p50
        if a.inter_token and b.inter_token and b.inter_token.p50:
            row["inter_token_p50"] = a.inter_token.p50 / b.inter_token.p50
        rows.append(row)
    return rows
