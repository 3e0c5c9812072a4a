"""mlx-run beside mlx_lm.server (or mlx_vlm.server): same model folder, same machine, same run, over HTTP.

    python tests/bench/versus_mlx_lm.py [--geometry llama-1b|small|tiny] [--peer mlx_lm|mlx_vlm] [--sections …]

Sections:
    levels    closed loops of 1, 8, 32 and 128 streaming clients on both in turn, then 512 on ours alone
    loop      the same requests through the engine's loop in a process of its own, without socket and HTTP
    adapters  nine adapters mixed in one batch beside the base model, on ours; and the peer, changing adapters
    join      requests that join a running batch of 32: the other rows' inter-token times, with and without

All servers are up at the same time, warmed before each level by requests like its own (the loop, and ours beside it, by
`--loop-warm` rounds of them), and take turns, so that none has the better minute. An idle server costs nothing here. A
level that takes longer than `--limit` seconds ends there, and is not repeated: what was answered, what failed and what
was not finished is counted. The loop's answers are of equal lengths, which ends whole groups of them at once, and then
of lengths that differ (`--loop-spreads`). With more than `--turns` clients the peer comes after ours, and a new server
in its place where it did not finish: it would work on for nobody. Shown are medians over repetitions (of the loop with
the least and the most, and of each repetition's share); with `--record` the lines of JSON have every repetition, as
soon as there is one.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from runner.bench.figures import median_level  # noqa: E402
from runner.bench.workers import Workers  # noqa: E402
from tests.bench.comparison import SAMPLING, Comparison, about, cells, plain  # noqa: E402
from tests.bench.geometry import GEOMETRIES  # noqa: E402
from tests.bench.join import Joined, join  # noqa: E402
from tests.bench.record import Budget, Record, add_options, progress  # noqa: E402
from tests.bench.servers import PEERS, EngineLoop, Peer, free_port, ours  # noqa: E402

SECTIONS = ("levels", "loop", "adapters", "join")
ADAPTERS = 9


def over_levels(comparison: Comparison) -> None:
    """Ours and the peer's throughput and latency at each number of clients."""
    name = comparison.options.peer
    record, budget = comparison.section("levels")
    for clients in comparison.options.clients:
        if budget.over:
            record.left_out(f"{clients} clients")
            continue
        both = clients <= comparison.options.peer_clients and comparison.peer is not None
        runs = comparison.both(clients, budget) if both else comparison.levels([comparison.us], clients, budget)
        figures = {"clients": clients, "mlx_run": plain(runs[0])}
        row = {"clients": str(clients), **cells("mlx-run", runs[0])}
        if both:
            mine, theirs = median_level(runs[0]), median_level(runs[1])
            ratio, ttft = mine.tokens_per_second / max(theirs.tokens_per_second, 1e-9), None
            if mine.ttft and theirs.ttft:
                ttft = mine.ttft.p50 / theirs.ttft.p50
            row |= cells(f"{name}.server", runs[1])
            row |= {"ratio of tokens/s": f"{ratio:.2f}×", "of TTFT p50": f"{ttft:.2f}×" if ttft else "-"}
            figures |= {name: plain(runs[1]), "ratio": ratio, "ttft_ratio": ttft}
        record.row(row, figures)
    record.finish()


def beside_the_loop(comparison: Comparison, model: Path) -> None:
    """Ours over HTTP beside the loop alone, in turn."""
    record, budget = comparison.section("loop")
    options = comparison.options
    with EngineLoop(model, options.max_rows) as loop:
        for clients in options.loop_clients:
            if budget.over:
                record.left_out(f"{clients} clients")
                continue
            # One client's requests never end together.
            for spread in options.loop_spreads if clients > 1 else (0.0,):
                http, alone = in_turn(comparison, loop, clients, spread, budget)
                shares = [one / other for one, other in zip(http, alone, strict=True)]
                row = {"clients": str(clients), "lengths differ by": f"{spread:.0%}"}
                row |= {"HTTP, tokens/s": around(http), "loop alone": around(alone)}
                row |= {"share": f"{statistics.median(http) / statistics.median(alone):.3f}"}
                row |= {"of neighbours": around(shares, ".3f")}
                figures = {"http": http, "loop": alone, "shares": shares, "share": statistics.median(shares)}
                record.row(row, {"clients": clients, "spread": spread, **figures})
    record.finish()


def in_turn(
    comparison: Comparison, loop: EngineLoop, clients: int, spread: float, budget: Budget
) -> tuple[list[float], list[float]]:
    """Tokens a second over HTTP and of the loop alone, each repetition of one beside one of the other.

    Before, both have as many rounds of just such requests: what an engine builds when it sees a shape of prompts, or of
    a batch, for the first few times, either of them has built then, or neither.
    """
    options = comparison.options
    question = {
        "rows": clients,
        "requests": comparison.requests(clients),
        "words": comparison.us.load.words,
        "max_tokens": options.max_tokens,
        "spread": spread,
        "sampling": SAMPLING,
        "seed": 0,
    }
    us = comparison.us._replace(load=msgspec.structs.replace(comparison.us.load, spread=spread))
    rounds = 0

    def http() -> float:
        (runs,) = comparison.levels([us], clients, budget, repeat=1, warm_up=0)
        return runs[0].tokens_per_second

    def alone() -> float:
        nonlocal rounds
        rounds += 1  # no prompt comes twice
        first = rounds * 1_000_000 + clients * 10_000 + (5_000 if spread else 0)
        return loop.ask(**question, first=first)["tokens_per_second"]

    for _ in range(options.loop_warm):
        http()
        alone()
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(options.repeat):
        both = ((found[0], http), (found[1], alone))
        for rates, measured in both if number % 2 == 0 else reversed(both):
            rates.append(measured())
        if budget.over:
            break
    return found


def around(values: list[float], form: str = ",.0f") -> str:
    """Their median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def adapters_mixed(comparison: Comparison, adapters: dict[str, Path]) -> None:
    """Nine adapters in turn beside none, on ours."""
    record, budget = comparison.section("adapters")
    base = comparison.us
    mixed = base._replace(load=msgspec.structs.replace(base.load, adapters=tuple(adapters)))
    for clients in comparison.options.adapter_clients:
        if budget.over:
            record.left_out(f"{clients} clients")
            continue
        runs = comparison.levels([base, mixed], clients, budget)
        base_rate, mixed_rate = (median_level(own).tokens_per_second for own in runs)
        row = {"clients": str(clients), "base, tokens/s": f"{base_rate:,.0f}"}
        row |= {f"{len(adapters)} adapters mixed": f"{mixed_rate:,.0f}", "ratio": f"{mixed_rate / base_rate:.3f}"}
        figures = {"clients": clients, "base": plain(runs[0]), "mixed": plain(runs[1])}
        record.row(row, {**figures, "ratio": mixed_rate / base_rate})
    if comparison.peer is not None and comparison.options.peer == "mlx_lm":
        adapters_changed(comparison, adapters, budget)
    record.finish()


def adapters_changed(comparison: Comparison, adapters: dict[str, Path], budget: Budget) -> None:
    """The peer, which loads the base again for each change."""
    assert comparison.peer is not None
    load = msgspec.structs.replace(
        comparison.peer.load, adapters=tuple(map(str, adapters.values())), adapter_field="adapters"
    )
    changing = comparison.peer._replace(load=load)
    (runs,) = comparison.levels([changing], 8, budget, repeat=1, requests=2 * len(adapters), warm_up=0)
    row = {"clients": "8", **cells("mlx_lm.server, changing adapters", runs)}
    Record(comparison.options.record, "adapters").row(row, {"clients": 8, "peer_mixed": plain(runs)})


def joining(comparison: Comparison) -> None:
    """What 32 running rows notice of requests that join them one after the other."""
    record, budget = comparison.section("join")
    running = min(32, comparison.options.max_rows - 1)
    for number in range(comparison.options.repeat):
        for joiners in (0, 1):
            settings = comparison.settings((33,))
            load = msgspec.structs.replace(comparison.us.load, seed=settings.seed)
            tokens = comparison.options.join_tokens
            if not number:  # the first of each kind compiles
                join(comparison.us.target, load, rows=running, tokens=tokens, by=joiners)
                load = msgspec.structs.replace(load, seed=settings.seed + 500_000)
            found: Joined = join(comparison.us.target, load, rows=running, tokens=tokens, by=joiners)
            values = found.gaps
            row = {"running": str(running), "joining": "one after the other" if joiners else "none"}
            row |= {"joined": str(found.joined), "p50, ms": f"{values.p50 * 1e3:.2f}", "p99": f"{values.p99 * 1e3:.2f}"}
            ratio = values.p99 / values.p50 if values.p50 else float("nan")
            row |= {"max": f"{values.max * 1e3:.2f}", "p99 / p50": f"{ratio:.2f}"}
            record.row(row, {"repetition": number, "joiners": joiners, "ratio": ratio, **msgspec.to_builtins(found)})
        if budget.over:
            break
    record.finish()


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
    parser.add_argument("--turns", type=int, default=32, help="the largest level at which it takes turns with ours")
    parser.add_argument("--loop-clients", default=(1, 8, 32, 128), **numbers)
    parser.add_argument("--loop-spreads", default=(0.0, 0.5), type=_shares, metavar="0,0.5", help="of answers' lengths")
    parser.add_argument("--loop-warm", type=int, default=4, help="rounds that HTTP and the loop have before it counts")
    parser.add_argument("--adapter-clients", default=(8, 32, 128), **numbers)
    parser.add_argument("--max-rows", type=int, default=128, help="ours: rows in a batch")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=2, help="requests a client in a level")
    parser.add_argument("--least", type=int, default=4, help="requests that a level has at least")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a level may take")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--join-tokens", type=int, default=512, help="length of the answers that others join")
    parser.add_argument(
        "--budgets", type=_budgets, default={}, metavar="levels=240,…", help="seconds that a section may take"
    )
    parser.add_argument("--until", type=float, metavar="SECONDS", help="end by itself then, counted from the start")
    add_options(parser)
    return parser.parse_args()


def _shares(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _budgets(text: str) -> dict[str, float]:
    return {name: float(seconds) for name, _, seconds in (part.partition("=") for part in text.split(","))}


def main() -> None:
    """Build, start, measure, print."""
    signal.signal(signal.SIGTERM, _end)
    chosen = options()
    whole = Budget(chosen.until)
    Record(chosen.record, "about").note("about", about(chosen))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = (chosen.folder or scratch).resolve()
        build = [sys.executable, str(ROOT / "tests" / "bench" / "llama_1b.py"), str(folder)]
        # In a process of its own: this one is to hold nothing of a GPU.
        subprocess.run([*build, "--geometry", chosen.geometry, "--bits", str(chosen.bits)], check=True)
        progress("the model's folder is there")
        if chosen.record is not None:
            stack.callback(_keep_logs, scratch, chosen.record)
        measure_sections(chosen, whole, folder, scratch, stack)


def measure_sections(chosen: argparse.Namespace, whole: Budget, folder: Path, scratch: Path, stack: ExitStack) -> None:
    """Start the servers, which end with the stack, and measure on them."""
    model = folder / "model"
    adapters = {f"a{number}": folder / "adapters" / f"a{number}" for number in range(ADAPTERS)}
    workers = stack.enter_context(Workers(4))
    us = stack.enter_context(ours(scratch, model, adapters, port=free_port(), max_rows=chosen.max_rows))
    progress("mlx-run is ready")
    theirs = {}
    if chosen.peer != "none":
        peer = Peer(chosen.peer, scratch, model, chosen.peer_args)
        theirs = {"peer": stack.enter_context(peer), "replace": peer.replace}
        progress(f"{chosen.peer}'s server answers")
    comparison = Comparison(chosen, workers, whole.within(chosen.budget), us, **theirs)
    comparison.warm()
    for section in chosen.sections:
        progress(f"{section} begins")
        match section:
            case "levels":
                over_levels(comparison)
            case "loop":
                beside_the_loop(comparison, model)
            case "adapters":
                adapters_mixed(comparison, adapters)
            case "join":
                joining(comparison)
            case _:
                sys.exit(f"--sections: {section} is none of {', '.join(SECTIONS)}")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(f"ended by signal {number}")


def _keep_logs(scratch: Path, record: Path) -> None:
    for log in scratch.glob("*.log"):
        shutil.copy(log, record)


if __name__ == "__main__":
    main()
