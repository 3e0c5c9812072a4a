"""What a quantised KV cache costs and saves: bytes, and the rate of decoding at a long context.

    python tests/bench/kv_quantised.py [--context 16384] [--rows 1 4] [--tokens 64] [--bits 16 8 4]

On a GPU with the geometry of Llama-3.2-1B in bfloat16, on the CPU with a small one in float32; random weights. Formats
are measured in turn, in rounds; rates are medians. The ratios are against the first format.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv.attention import install
from runner.engine.kv.caches import Caches, Layout
from runner.engine.kv.quantised import Quantisation
from tests.bench.geometry import LLAMA_1B, SMALL, build, on_gpu

CHUNK = 512


def prefilled(model: Any, layout: Layout, rows: int, context: int) -> Caches:
    """Rows of about `context` tokens each, none as long as another."""
    caches = None
    for row in range(rows):
        alone, length = layout.new(), context - 3 * row
        alone.reserve(length)
        for at in range(0, length, CHUNK):
            tokens = mx.array([[(7 * i + row) % 997 for i in range(at, min(at + CHUNK, length))]])
            alone.call(model, tokens)
            mx.eval(alone.arrays)
        if caches is None:
            caches = alone
        else:
            caches.join(alone)
            mx.eval(caches.arrays)
    assert caches is not None
    return caches


def rate(model: Any, caches: Caches, tokens: int) -> float:
    """Tokens a second of greedy decoding, dispatched one step ahead."""
    fed = mx.zeros((caches.rows, 1), dtype=mx.uint32)
    previous = fed
    began = time.perf_counter()
    for _ in range(tokens):
        fed = mx.argmax(caches.call(model, fed)[:, -1:], axis=-1)
        start(fed)
        mx.eval(previous)
        previous = fed
    mx.eval(fed)
    return tokens * caches.rows / (time.perf_counter() - began)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384 if on_gpu() else 2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    model = build(LLAMA_1B, mx.bfloat16) if on_gpu() else build(SMALL, mx.float32)
    install(model)
    print(f"{mx.default_device()}, {arguments.context} tokens a row, groups of {arguments.group_size}")
    print(f"{'rows':>4} {'bits':>4} {'MiB':>8} {'ratio':>6} {'tokens/s':>9} {'ratio':>6} {'peak MiB':>9}")
    for rows in arguments.rows:
        measure(model, rows, arguments)


def measure(model: Any, rows: int, arguments: argparse.Namespace) -> None:
    """One line a format."""
    caches = {}
    for bits in arguments.bits:
        quantisation = None if bits >= 16 else Quantisation(bits, arguments.group_size)
        caches[bits] = prefilled(model, Layout(model, quantisation=quantisation), rows, arguments.context)
        rate(model, caches[bits], 8)
    rates: dict[int, list[float]] = {bits: [] for bits in caches}
    peaks: dict[int, int] = {}
    for _ in range(arguments.repeat):
        for bits, cache in caches.items():
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            rates[bits].append(rate(model, cache, arguments.tokens))
            peaks[bits] = mx.get_peak_memory() - before
    first = arguments.bits[0]
    for bits, cache in caches.items():
        median, of = statistics.median(rates[bits]), statistics.median(rates[first])
        share = cache.nbytes / caches[first].nbytes
        print(
            f"{rows:>4} {bits:>4} {cache.nbytes / 2**20:>8.1f} {share:>6.3f} {median:>9.1f} {median / of:>6.2f} "
            f"{peaks[bits] / 2**20:>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
