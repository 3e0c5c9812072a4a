"""What a quantised KV cache costs and saves: bytes, and the rate of decoding at a long context.

    python tests/bench/kv_quantised.py [--context 16384] [--rows 1 4] [--tokens 64] [--bits 16 8 4] [--prefill]
    python tests/bench/kv_quantised.py --rows 4 --spread 4096 --bits 16 8 8@2048 8@10000 8@20000

8@10000 is 8 bits from position 10,000 on; with a spread, rows are that much shorter each than the one before, so that
such a batch may be on both sides.

On a GPU with the geometry of Llama-3.2-1B in bfloat16, on the CPU with a small one in float32; random weights, drawn on
the device. Neither bytes nor rate depend on what keys and values say, so the caches are filled with random ones,
without the model; `--prefill` measures at the end how long the model takes for as many. Formats are measured in turn,
in rounds; rates are medians. The ratios are against the first format.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.joined import join_siblings
from runner.engine.kv.attention import install
from runner.engine.kv.caches import Caches
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.traced import TracedCalls
from tests.bench.geometry import GEOMETRIES, draw_model, usual
from tests.bench.in_memory import layout_of
from tests.bench.record import Budget, Record, add_options, progress

PART = 4096
"""Tokens a row that are filled in at a time."""

CHUNK = 512
"""Tokens of a call of a prefill."""


class Filler:
    """Stands where a model would, and only writes keys and values."""

    def __init__(self, geometry: dict[str, Any]) -> None:
        self._heads, self._width = geometry["num_key_value_heads"], geometry["head_dim"]
        self._dtype = getattr(mx, geometry["dtype"])

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        rows, count = tokens.shape
        for layer in cache:
            keys, values = mx.random.normal((2, rows, self._heads, count, self._width), self._dtype)
            layer.update_and_fetch(keys, values)
        return tokens


def filled(geometry: dict[str, Any], layout: Layout, rows: int, context: int, spread: int) -> Caches:
    """Rows of `context` tokens and less, none as long as another."""
    caches = layout.new(rows)
    caches.reserve(context)
    left = [context - spread * row for row in range(rows)]
    while (count := min(PART, max(left))) > 0:
        lengths = [min(count, more) for more in left]
        caches.call(Filler(geometry), mx.zeros((rows, count), dtype=mx.uint32), lengths)
        mx.eval(caches.arrays)
        left = [more - done for more, done in zip(left, lengths, strict=True)]
    return caches


def rate(call: TracedCalls, caches: Caches, tokens: int) -> float:
    """Tokens a second of greedy decoding, dispatched one step ahead."""
    fed = mx.zeros((caches.rows, 1), dtype=mx.uint32)
    previous = fed
    began = time.perf_counter()
    for _ in range(tokens):
        fed = mx.argmax(call(caches, fed)[:, -1:], axis=-1)
        start(fed)
        caches.dispatched()
        mx.eval(previous)
        previous = fed
    mx.eval(fed)
    return tokens * caches.rows / (time.perf_counter() - began)


class Formats:
    """The same rows cached in every format, and what was measured of them."""

    def __init__(self, model: Any, arguments: argparse.Namespace, rows: int) -> None:
        self.rows = rows
        self._call = TracedCalls(model)
        self._tokens = arguments.tokens
        self.caches: dict[str, Caches] = {}
        for name in arguments.bits:
            layout = cached_in(model, name, arguments)
            self.caches[name] = filled(
                GEOMETRIES[arguments.geometry], layout, rows, arguments.context, arguments.spread
            )
            progress(f"{rows} rows, {name} bits: filled, {self.caches[name].nbytes / 2**20:.0f} MiB")
            rate(self._call, self.caches[name], 8)
            progress(f"{rows} rows, {name} bits: warm")
        self.rates: dict[str, list[float]] = {name: [] for name in self.caches}
        self._peaks: dict[str, int] = {}

    def round(self) -> None:
        """Measures each once."""
        for name, cache in self.caches.items():
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            self.rates[name].append(rate(self._call, cache, self._tokens))
            self._peaks[name] = mx.get_peak_memory() - before
        progress(
            f"{self.rows} rows: " + ", ".join(f"{name} bits {rates[-1]:.1f}/s" for name, rates in self.rates.items())
        )

    def write(self, record: Record) -> None:
        """A row a format."""
        first = next(iter(self.caches))
        for name, cache in self.caches.items():
            median = statistics.median(self.rates[name])
            share, ratio = cache.nbytes / self.caches[first].nbytes, median / statistics.median(self.rates[first])
            cells = {
                "rows": str(self.rows),
                "bits": name,
                "MiB": f"{cache.nbytes / 2**20:.1f}",
                "of the first": f"{share:.3f}",
                "tokens/s": f"{median:,.1f}",
                "of the first's": f"{ratio:.3f}",
                "peak beside, MiB": f"{self._peaks[name] / 2**20:.1f}",
            }
            figures = {"rows": self.rows, "bits": name, "nbytes": cache.nbytes, "bytes_ratio": share}
            record.row(cells, {**figures, "rates": self.rates[name], "rate_ratio": ratio})


def cached_in(model: Any, name: str, arguments: argparse.Namespace) -> Layout:
    """As the engine would; 16 bits are what the model computes in."""
    bits, _, start = name.partition("@")
    quantisation = Quantisation(int(bits), arguments.group_size, int(start or 0))
    return layout_of(model, None if quantisation.bits >= 16 else quantisation)


def prefill(model: Any, layout: Layout, context: int, budget: Budget) -> tuple[int, float]:
    """Tokens of a prompt that were computed, and the seconds that they took, within the budget."""
    caches, done, began = layout.new(), 0, time.perf_counter()
    caches.reserve(context)
    while done < context and not budget.over:
        count = min(CHUNK, context - done)
        caches.call(model, mx.array([[(7 * i) % 997 for i in range(done, done + count)]]))
        mx.eval(caches.arrays)
        done += count
        if done % (8 * CHUNK) == 0:
            progress(f"prefill: {done} tokens after {time.perf_counter() - began:.2f} s")
    return done, time.perf_counter() - began


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default=usual())
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", nargs="+", default=["16", "8", "4"])
    parser.add_argument("--spread", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prefill", action="store_true")
    add_options(parser)
    arguments = parser.parse_args()
    budget = Budget(arguments.budget)
    progress(f"{mx.default_device()}, {arguments.geometry}, {arguments.context} tokens a row")
    model = draw_model(GEOMETRIES[arguments.geometry])
    join_siblings(model, lambda: Layout(model).new().call(model, mx.array([[0]])))
    mx.eval(model.parameters())
    install(model)
    progress("weights are drawn")
    record = Record(arguments.record, "kv", f"KV cache at {arguments.context} tokens")
    for rows in arguments.rows:
        if budget.over:
            record.left_out(f"{rows} rows")
            break
        formats = Formats(model, arguments, rows)
        for _ in range(arguments.repeat):
            formats.round()
            if budget.over:
                break
        formats.write(record)
        del formats
    if arguments.prefill:
        measure_prefill(model, arguments, budget)
    record.finish()


def measure_prefill(model: Any, arguments: argparse.Namespace, budget: Budget) -> None:
    """A row a format."""
    record = Record(arguments.record, "kv", f"prefill of {arguments.context} tokens, in calls of {CHUNK}")
    for name in arguments.bits:
        layout = cached_in(model, name, arguments)
        done, seconds = prefill(model, layout, arguments.context, budget)
        cells = {"bits": name, "tokens": f"{done}", "seconds": f"{seconds:.2f}"}
        cells["tokens/s"] = f"{done / seconds:,.0f}"
        record.row(cells, {"bits": name, "tokens": done, "seconds": seconds})


if __name__ == "__main__":
    main()
