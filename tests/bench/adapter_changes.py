"""What a change of adapters costs a request: ours, whose adapters are all there, and mlx_lm.server, which loads anew.

    python tests/bench/adapter_changes.py [--geometry llama-1b] [--folder FOLDER] [--peer mlx_lm|none] [--repeat 5]

One request after the other, not streamed, of some 256 tokens and with an answer of 32: with the adapter of the request
before, and with another one, in turn. Seconds, medians, after requests of both kinds that do not count; each is
printed as soon as it is there, so that a run that is cut off has shown something.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count, cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.bench.job import Load, Target  # noqa: E402
from runner.bench.prompts import prompt  # noqa: E402
from tests.bench.geometry import GEOMETRIES  # noqa: E402
from tests.bench.record import Budget, Record, add_options, progress  # noqa: E402
from tests.bench.servers import Peer, free_port, ours  # noqa: E402

ADAPTERS = 3
SAME, ANOTHER = "the same adapter", "another one"
Found = dict[str, list[float]]
LOAD = Load(words=240, seed=int(time.time()), max_tokens=32)


def seconds(target: Target, field: str, adapter: str, number: int) -> float:
    """Of one request. Raises SystemExit where it is not answered."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt(LOAD, number)}],
        "max_tokens": LOAD.max_tokens,
        field: adapter,
    }
    connection = http.client.HTTPConnection(target.host, target.port, timeout=60)
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            sys.exit(f"{response.status}: {answer[:500].decode(errors='replace')}")
        return time.perf_counter() - began
    finally:
        connection.close()


def measure(name: str, target: Target, field: str, adapters: list[str], repeat: int, budget: Budget) -> Found:
    """Seconds of requests of both kinds, the first of each left out; fewer than `repeat` where the time is over."""
    numbers, turns = count(), cycle(adapters)
    found: Found = {SAME: [], ANOTHER: []}
    for repetition in range(repeat + 1):
        adapter = next(turns)
        for times in (found[ANOTHER], found[SAME]):
            took = seconds(target, field, adapter, next(numbers))
            if repetition:
                times.append(took)
        if repetition:
            shown = ", ".join(f"{kind} {times[-1]:.3f} s" for kind, times in found.items())
            progress(f"{name}: {shown}")
            if budget.over:
                break
    return found


def row(name: str, found: Found) -> dict[str, str]:
    """Of the table."""
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    cells = {"server": name, "n": str(len(found[SAME]))}
    cells |= {f"{kind}, s": f"{median:.3f}" for kind, median in medians.items()}
    return cells | {"ratio": f"{medians[ANOTHER] / medians[SAME]:.2f}"}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-1b")
    parser.add_argument("--folder", type=Path, help="where the model is, or is built (default: a temporary folder)")
    parser.add_argument("--peer", choices=("mlx_lm", "none"), default="mlx_lm")
    parser.add_argument("--repeat", type=int, default=5)
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Build, start, measure, print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # which ends the servers
    arguments = options()
    budget, record = Budget(arguments.budget), Record(arguments.record, "changes", "a change of adapters")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = (arguments.folder or scratch).resolve()
        build = [sys.executable, str(ROOT / "tests" / "bench" / "llama_1b.py"), str(folder)]
        subprocess.run([*build, "--geometry", arguments.geometry], check=True)
        model = folder / "model"
        adapters: Mapping[str, Path] = {f"a{n}": folder / "adapters" / f"a{n}" for n in range(ADAPTERS)}
        mine = stack.enter_context(ours(scratch, model, adapters, port=free_port(), max_rows=8))
        found = measure("mlx-run", mine, "adapter_name", [*adapters], arguments.repeat, budget)
        record.row(row("mlx-run", found), {"server": "mlx-run", **found})
        if arguments.peer != "none":
            theirs = stack.enter_context(Peer(arguments.peer, scratch, model, []))
            paths = [*map(str, adapters.values())]
            found = measure(arguments.peer, theirs, "adapters", paths, arguments.repeat, budget)
            record.row(row(f"{arguments.peer}.server", found), {"server": arguments.peer, **found})
    record.finish()


if __name__ == "__main__":
    main()
