"""mlx-run beside mlx_lm.server (or mlx_vlm.server): same model folder, same machine, same run, over HTTP.

    python tests/bench/versus_mlx_lm.py [--geometry llama-1b|tiny] [--peer mlx_lm|mlx_vlm] [--sections …] [--out F.json]

Sections:
    levels    closed loops of 1, 8, 32 and 128 streaming clients on both in turn, then 512 on ours alone
    loop      the same requests through the engine's loop in a process of its own, without socket and HTTP
    adapters  nine adapters mixed in one batch beside the base model, on ours; and the peer, changing adapters
    join      requests that join a running batch of 32: the other rows' inter-token times, with and without

All servers are up at the same time, warmed before each level, and take turns, so that none has the better minute. An
idle server costs nothing here. Prints medians over repetitions; the JSON has every repetition.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from runner.bench.figures import Level, median_level  # noqa: E402
from runner.bench.job import Target  # noqa: E402
from runner.bench.run import Settings, Subject, calibrate, measure  # noqa: E402
from runner.bench.workers import Workers  # noqa: E402
from tests.bench.join import Joined, join  # noqa: E402
from tests.bench.llama_1b import ADAPTERS, GEOMETRIES, build  # noqa: E402
from tests.bench.servers import PEERS, EngineLoop, free_port, ours  # noqa: E402

SECTIONS = ("levels", "loop", "adapters", "join")
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


class Comparison:
    """The servers that are up, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, workers: Workers, us: Target, peer: Target | None) -> None:
        self.options = options
        self.workers = workers
        self.result: dict[str, Any] = {"about": about(options)}
        self._seed = int(time.time())
        self.us = calibrate(workers, us, self.settings(()))
        self.peer = None if peer is None else calibrate(workers, peer, self.settings(()))

    def settings(self, clients: tuple[int, ...], **more: Any) -> Settings:
        """What all sections have in common. Each gets a seed of its own, so that no prompt comes twice."""
        self._seed += 1
        options = self.options
        per_client = {} if len(clients) != 1 else {"requests": max(options.least, options.per_client * clients[0])}
        chosen = {"repeat": options.repeat, **per_client, **more}
        return Settings(
            clients=clients,
            prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            body=SAMPLING,
            seed=self._seed,
            **chosen,
        )

    def levels(self, subjects: list[Subject], clients: int, **more: Any) -> list[list[Level]]:
        """Each subject's repetitions at one number of clients."""
        settings = self.settings((clients,), **more)
        found: list[list[Level]] = [[] for _ in subjects]
        fresh = [s._replace(load=msgspec.structs.replace(s.load, seed=settings.seed)) for s in subjects]
        for measured in measure(self.workers, fresh, settings):
            found[measured.subject].append(measured.level)
            for kind, failure in measured.level.failures.items():
                print(f"      {clients} clients, server {measured.subject}: {failure.count} × {kind} {failure.message}")
        return found

    def section(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keeps a section's rows."""
        self.result[name] = rows
        if self.options.out:
            self.options.out.write_text(json.dumps(self.result, indent=2) + "\n")


def over_levels(comparison: Comparison) -> None:
    """Ours and the peer's throughput and latency at each number of clients."""
    name = comparison.options.peer
    print(f"\nlevels: mlx-run | {name}.server | ratio")
    print(f"{'clients':>7}  {'tokens/s':>9} {'TTFT p50':>9} {'p99':>8} {'between':>8} {'failed':>6}  |", end="")
    print(f"{'tokens/s':>9} {'TTFT p50':>9} {'p99':>8} {'between':>8} {'failed':>6}  | {'tok/s':>6} {'TTFT':>6}")
    rows = []
    for clients in comparison.options.clients:
        both = clients <= comparison.options.peer_clients and comparison.peer is not None
        subjects = [comparison.us, comparison.peer] if both else [comparison.us]
        runs = comparison.levels([s for s in subjects if s], clients)
        row = {"clients": clients, "mlx_run": plain(runs[0])}
        mine = median_level(runs[0])
        line = f"{clients:>7}  {cells(mine)}  |"
        if len(runs) == 2:
            theirs = median_level(runs[1])
            row[name] = plain(runs[1])
            row["ratio"] = {"tokens_per_second": mine.tokens_per_second / theirs.tokens_per_second}
            line += f"{cells(theirs)}  | {row['ratio']['tokens_per_second']:>5.2f}×"
            if mine.ttft and theirs.ttft:
                row["ratio"]["ttft_p50"] = mine.ttft.p50 / theirs.ttft.p50
                line += f" {row['ratio']['ttft_p50']:>5.2f}×"
        print(line, flush=True)
        rows.append(row)
        comparison.section("levels", rows)


def beside_the_loop(comparison: Comparison, model: Path) -> None:
    """Ours over HTTP beside the loop alone, in turn."""
    print(f"\nover HTTP beside the engine's loop\n{'clients':>7}  {'HTTP':>9} {'loop':>9}  share")
    rows = []
    options = comparison.options
    with EngineLoop(model, options.max_rows) as loop:
        for clients in options.loop_clients:
            question = {
                "rows": clients,
                "words": comparison.us.load.words,
                "max_tokens": options.max_tokens,
                "sampling": SAMPLING,
                "seed": 0,
            }
            requests = max(options.least, options.per_client * clients)
            loop.ask(**{**question, "requests": clients, "first": 0})
            alone, http = [], []
            for number in range(options.repeat):
                (runs,) = comparison.levels([comparison.us], clients, repeat=1)
                http.append(runs[0].tokens_per_second)
                first = (1 + number) * 1_000_000 + clients * 10_000
                alone.append(loop.ask(**{**question, "requests": requests, "first": first})["tokens_per_second"])
            share = statistics.median(http) / statistics.median(alone)
            print(f"{clients:>7}  {statistics.median(http):>9,.0f} {statistics.median(alone):>9,.0f}  {share:.3f}")
            rows.append({"clients": clients, "http": http, "loop": alone, "share": share})
            comparison.section("loop", rows)


def adapters_mixed(comparison: Comparison, names: list[str], paths: list[Path]) -> None:
    """Nine adapters in turn beside none, on ours; then the peer, which loads the base again for each change."""
    print(f"\n{len(names)} adapters mixed, mlx-run\n{'clients':>7}  {'base':>9} {'mixed':>9}  ratio")
    base = comparison.us
    mixed = base._replace(load=msgspec.structs.replace(base.load, adapters=tuple(names)))
    rows = []
    for clients in comparison.options.adapter_clients:
        runs = comparison.levels([base, mixed], clients)
        plain_rate, mixed_rate = (median_level(own).tokens_per_second for own in runs)
        print(f"{clients:>7}  {plain_rate:>9,.0f} {mixed_rate:>9,.0f}  {mixed_rate / plain_rate:.3f}", flush=True)
        row = {"clients": clients, "base": plain(runs[0]), "mixed": plain(runs[1]), "ratio": mixed_rate / plain_rate}
        rows.append(row)
        comparison.section("adapters", rows)
    if comparison.peer is None or comparison.options.peer != "mlx_lm":
        return
    load = msgspec.structs.replace(comparison.peer.load, adapters=tuple(map(str, paths)), adapter_field="adapters")
    clients = min(8, len(names))
    (runs,) = comparison.levels(
        [comparison.peer._replace(load=load)], clients, repeat=1, requests=2 * len(names), warm_up=0
    )
    rate = runs[0].tokens_per_second
    print(f"{clients:>7}  mlx_lm.server, changing adapters: {rate:,.0f} tokens/s ({runs[0].failed} failed)")
    comparison.section("adapters_peer", [{"clients": clients, "mixed": plain(runs)}])


def joining(comparison: Comparison) -> None:
    """What 32 running rows notice of requests that join them one after the other."""
    rows_running = min(32, comparison.options.max_rows - 1)
    print(f"\nrows that join a running batch of {rows_running}: the others' inter-token times, ms")
    print(f"{'':>10} {'p50':>8} {'p99':>8} {'max':>8} {'p99/p50':>8} {'joined':>7}")
    rows = []
    tokens = comparison.options.join_tokens
    for number in range(comparison.options.repeat):
        for joiners in (0, 1):
            settings = comparison.settings((33,))
            load = msgspec.structs.replace(comparison.us.load, seed=settings.seed)
            found: Joined = join(comparison.us.target, load, rows=rows_running, tokens=tokens, by=joiners)
            label = "with" if joiners else "without"
            values = found.gaps
            print(
                f"{label:>10} {values.p50 * 1e3:>8.2f} {values.p99 * 1e3:>8.2f} {values.max * 1e3:>8.2f} "
                f"{values.p99 / values.p50 if values.p50 else float('nan'):>8.2f} {found.joined:>7}",
                flush=True,
            )
            rows.append({"repetition": number, "joiners": joiners, **msgspec.to_builtins(found)})
    comparison.section("join", rows)


def plain(runs: list[Level]) -> list[dict[str, Any]]:
    """Levels for the JSON file."""
    return [msgspec.to_builtins(level) for level in runs]


def cells(level: Level) -> str:
    """A level in a table's row; times in ms."""
    times = [f"{'-':>9} {'-':>8}", f"{'-':>8}"]
    if level.ttft and level.inter_token:
        times = [
            f"{level.ttft.p50 * 1e3:>9,.1f} {level.ttft.p99 * 1e3:>8,.0f}",
            f"{level.inter_token.p50 * 1e3:>8,.2f}",
        ]
    return f"{level.tokens_per_second:>9,.0f} {times[0]} {times[1]} {level.failed:>6}"


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
    import subprocess

    code = "import mlx.core as mx; print(mx.default_device(), mx.device_info())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: tuple(map(int, text.split(",")))}
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-1b")
    parser.add_argument("--bits", type=int, default=0, help="quantise the weights")
    parser.add_argument("--folder", type=Path, help="where the model is, or is built (default: a temporary folder)")
    parser.add_argument("--peer", choices=(*PEERS, "none"), default="mlx_lm")
    parser.add_argument("--peer-args", type=shlex.split, default=[], help="further arguments of the peer's server")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--clients", default=(1, 8, 32, 128, 512), **numbers)
    parser.add_argument("--peer-clients", type=int, default=128, help="the largest level that the peer takes part in")
    parser.add_argument("--loop-clients", default=(1, 8, 32, 128), **numbers)
    parser.add_argument("--adapter-clients", default=(8, 32, 128), **numbers)
    parser.add_argument("--max-rows", type=int, default=128, help="ours: rows in a batch")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=2, help="requests a client in a level")
    parser.add_argument("--least", type=int, default=4, help="requests that a level has at least")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--join-tokens", type=int, default=512, help="length of the answers that others join")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Build, start, measure, print."""
    chosen = options()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = (chosen.folder or scratch).resolve()
        model = build(folder, chosen.geometry, bits=chosen.bits)
        names = [f"a{number}" for number in range(ADAPTERS)]
        paths = [folder / "adapters" / name for name in names]
        workers = stack.enter_context(Workers(4))
        us = stack.enter_context(
            ours(scratch, model, dict(zip(names, paths, strict=True)), port=free_port(), max_rows=chosen.max_rows)
        )
        peer = None
        if chosen.peer != "none":
            peer = stack.enter_context(PEERS[chosen.peer](scratch, model, port=free_port(), arguments=chosen.peer_args))
        comparison = Comparison(chosen, workers, us, peer)
        print(json.dumps(comparison.result["about"], indent=1))
        if "levels" in chosen.sections:
            over_levels(comparison)
        if "loop" in chosen.sections:
            beside_the_loop(comparison, model)
        if "adapters" in chosen.sections:
            adapters_mixed(comparison, names, paths)
        if "join" in chosen.sections:
            joining(comparison)


if __name__ == "__main__":
    main()
