"""Where the time of a decode step goes: building its graph, starting it, waiting for the one before, the rest.

    python tests/bench/step_time.py [--geometry llama-1b] [--rows 1 8 32 128] [--steps 64] [--prompt 256] [--greedy]
        [--adapters 9 [--rank 8] [--beside 3]] [--bits 8]

The engine's own loop on a model of random weights, all rows in the batch, prompts of different lengths; at
temperature 0.7 with top_p 0.9 unless greedy. With adapters, on all linear layers, rows take them and the
base model in turn; with bits, keys and values are cached in so many. Milliseconds a step, means over the steps;
tokens a second are those of the steps alone. With `--beside`, base rows alone and mixed ones are measured in turn, so
often, and the ratio of their medians is shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine import batch, traced  # noqa: E402
from runner.engine.kv.quantised import Quantisation  # noqa: E402
from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.protocol import FromEngine, Generate, Sampling, encode_frame  # noqa: E402
from tests.bench.engine_throughput import draw_adapters, prompt  # noqa: E402
from tests.bench.geometry import GEOMETRIES, usual  # noqa: E402
from tests.bench.in_memory import draw  # noqa: E402

SAMPLED = {"temperature": 0.7, "top_p": 0.9}


class Watch:
    """How long a function takes, all its calls together."""

    def __init__(self, module: Any, name: str) -> None:
        self.seconds = 0.0
        self._function = getattr(module, name)
        setattr(module, name, self)

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else partial(self, instance)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._function(*arguments, **more)
        finally:
            self.seconds += time.perf_counter() - began


def emit(frame: FromEngine) -> None:
    """What the engine's socket would cost."""
    encode_frame(frame)


def measure(engine: Engine, rows: int, keys: list[str], arguments: argparse.Namespace) -> tuple[str, float]:
    """One line: milliseconds of all, building, starting, waiting, and tokens a second; and these."""
    sampling = Sampling(**({} if arguments.greedy else SAMPLED))
    # Enough tokens that none ends before the last has joined and all steps are made.
    tokens = arguments.steps + 40 + rows
    for row in range(rows):
        words = prompt(row, arguments.prompt - 7 * row % 50)
        adapter = keys[row % len(keys)]
        engine.submit(Generate(id=row, prompt=words, max_tokens=tokens, adapter=adapter, sampling=sampling))
    while engine.stats().rows < rows:
        engine.step()
    for _ in range(16):
        engine.step()
    starting.seconds = reading.seconds = building.seconds = 0.0
    began = time.perf_counter()
    for _ in range(arguments.steps):
        engine.step()
    seconds = time.perf_counter() - began
    engine.cancel_all()
    while engine.busy:
        engine.step()
    parts = [seconds, building.seconds, starting.seconds, reading.seconds]
    milliseconds = " ".join(f"{part / arguments.steps * 1000:>8.3f}" for part in parts)
    rate = rows * arguments.steps / seconds
    return f"{rows:>5} {milliseconds} {rate:>9.0f}", rate


def beside(engine: Engine, rows: int, keys: list[str], arguments: argparse.Namespace) -> None:
    """Base rows and mixed ones in turn."""
    rates: dict[str, list[float]] = {"base": [], "mixed": []}
    for _ in range(arguments.beside):
        for name, chosen in (("base", keys[:1]), ("mixed", keys)):
            rates[name].append(measure(engine, rows, chosen, arguments)[1])
    base, mixed = (statistics.median(found) for found in rates.values())
    print(f"{rows:>5} rows: base {base:,.0f}, mixed {mixed:,.0f} tokens/s: {mixed / base:.3f}", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default=usual())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--beside", type=int, default=0, metavar="TIMES")
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--greedy", action="store_true")
    arguments = parser.parse_args()
    shown = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MLX_"))
    print(f"{arguments.geometry} on {mx.default_device()}; {shown}")
    with tempfile.TemporaryDirectory() as scratch:
        bits = Quantisation(arguments.bits, 64) if arguments.bits else None
        loaded = draw(Path(scratch), arguments.geometry, quantisation=bits)
        print(f"{'rows':>5} {'all':>8} {'build':>8} {'start':>8} {'wait':>8} {'tokens/s':>9}", flush=True)
        engine = Engine(loaded, Limits(max_rows=max(arguments.rows), prefix_cache_bytes=0), emit)
        adapters = draw_adapters(loaded, Path(scratch), arguments.adapters, arguments.rank)
        keys = ["", *(engine.load_adapter(source).key for source in adapters)]
        for rows in arguments.rows:
            measure(engine, rows, keys, arguments)  # kernels are compiled, and loaded
            print(measure(engine, rows, keys, arguments)[0], flush=True)
            if arguments.beside:
                beside(engine, rows, keys, arguments)


starting, reading = Watch(batch, "start"), Watch(batch.StepResult, "read")
building = Watch(traced.TracedCalls, "__call__")

if __name__ == "__main__":
    main()
