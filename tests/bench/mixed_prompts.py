"""What it takes to prefill prompts of different adapters in one call: beside the base's, one adapter's, by each way.

    python tests/bench/mixed_prompts.py [--geometry llama-1b] [--rows 1 4 8] [--tokens 256] [--adapters 9] [--rank 8]
        [--repeat 9] [--seconds 60]

The calls that the engine makes of prompts, on a model of random weights, with adapters on all linear layers; row i has
adapter i. `engine` is the way that it would take; the others are those of `runner/engine/adapters/mixed.py`, and how
it was before there were any (copies and a sum apart on CUDA, elsewhere products that count their rows). All ways are
measured in turn. Milliseconds a call, medians: `all` of it, and `host` for building and starting it; `ratio` is the
median of the base's share of the time in the same round. A single row has one adapter, so there is nothing to choose.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine.adapters import mixed  # noqa: E402
from runner.engine.adapters.bank import AdapterBank  # noqa: E402
from runner.engine.adapters.layers import RowSlots  # noqa: E402
from runner.engine.adapters.stack import Stack  # noqa: E402
from runner.engine.arrays import start  # noqa: E402
from runner.engine.loader import LoadedModel  # noqa: E402
from runner.engine.traced import TracedCalls  # noqa: E402
from tests.bench.engine_throughput import draw_adapters  # noqa: E402
from tests.bench.geometry import GEOMETRIES, usual  # noqa: E402
from tests.bench.in_memory import draw  # noqa: E402
from tests.bench.record import Budget, progress  # noqa: E402

WARM = 4
"""Calls before any is measured: graphs are kept from the third on."""

Copied = Callable[[mx.array, mx.array, Stack, mx.array], mx.array]


def before(x: mx.array, y: mx.array, stack: Stack, slots: mx.array) -> mx.array:
    """y plus the changes to x, as they were."""
    a = stack.down.swapaxes(-1, -2)
    if mx.cuda.is_available():
        change = (x @ a[slots]) @ stack.b[slots]
    else:
        change = mx.gather_mm(x, a, rhs_indices=slots)
        change = mx.gather_mm(change, stack.b, rhs_indices=slots)
    return y + change.astype(y.dtype)


@contextmanager
def taken(way: str) -> Iterator[None]:
    """Have changes added so."""
    if way in ("base", "one adapter", "engine"):
        yield
        return
    copied: Copied = before if way == "before" else mixed.copied
    name = "copied" if way == "before" else way
    with patch.object(mixed, "way", lambda *_: name), patch.object(mixed, "copied", copied):
        yield


class Prompts:
    """Calls of so many rows of so many tokens, each row with one of `keys`."""

    def __init__(self, loaded: LoadedModel, bank: AdapterBank, way: str, rows: int, tokens: int) -> None:
        self._loaded, self._way = loaded, way
        # Kept graphs are of one way.
        self._call = TracedCalls(loaded.model, bank)
        several = 1 if way == "one adapter" else len(bank.keys)
        keys = [bank.keys[row % several] for row in range(rows)]
        self._slots: RowSlots | None = None if way == "base" else bank.slots([bank.acquire(key) for key in keys])
        self._tokens = mx.random.randint(0, loaded.vocabulary, (rows, tokens), key=mx.random.key(rows))
        mx.eval(self._tokens)

    def __call__(self) -> tuple[float, float]:
        """Seconds of a call, and those of them that the host is busy."""
        rows, tokens = self._tokens.shape
        caches = self._loaded.layout.restore([None] * rows, tokens, [tokens] * rows)
        began = time.perf_counter()
        with taken(self._way):
            self._call(caches, self._tokens, self._slots, [tokens] * rows)
            start(caches.by_layer)
        busy = time.perf_counter() - began
        caches.dispatched()
        mx.eval(caches.arrays)
        return time.perf_counter() - began, busy


def ways(rows: int) -> list[str]:
    """What there is to measure for so many rows."""
    choices = ["engine", "before", "together", "copied"] if rows > 1 else []
    # On CUDA it is compiled for a minute and more.
    return ["base", "one adapter", *choices, *(["gathered"] if choices and not mx.cuda.is_available() else [])]


def measure(loaded: LoadedModel, bank: AdapterBank, rows: int, arguments: argparse.Namespace, budget: Budget) -> None:
    """A line for each way."""
    calls = {way: Prompts(loaded, bank, way, rows, arguments.tokens) for way in ways(rows)}
    for way, call in calls.items():
        took = [call()[0] for _ in range(WARM)]
        progress(f"{rows} rows, {way}: first call {took[0] * 1000:.0f} ms, then {took[-1] * 1000:.2f}")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in calls}
    for turn in range(arguments.repeat):
        if turn and budget.over:
            progress(f"out of time after {turn} rounds")
            break
        for way, call in calls.items():
            found[way].append(call())
    for way, figures in found.items():
        whole, host = (statistics.median(part) * 1000 for part in zip(*figures, strict=True))
        share = statistics.median(base / own for (base, _), (own, _) in zip(found["base"], figures, strict=True))
        print(f"{rows:>5} {way:<12} {whole:>9.3f} {host:>9.3f} {share:>6.3f}", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default=usual())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=None)
    arguments = parser.parse_args()
    budget = Budget(arguments.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = draw(Path(scratch), arguments.geometry)
        bank = AdapterBank(loaded.model, loaded.dtype)
        for source in draw_adapters(loaded, Path(scratch), arguments.adapters, arguments.rank):
            bank.load(source)
        print(f"{arguments.geometry} on {mx.default_device()}, {arguments.adapters} adapters of rank {arguments.rank}")
        print(f"{'rows':>5} {'way':<12} {'all, ms':>9} {'host, ms':>9} {'ratio':>6}", flush=True)
        for rows in arguments.rows:
            measure(loaded, bank, rows, arguments, budget)


if __name__ == "__main__":
    main()
