"""What writing and attending cost a layer of a decode step, in separate operations and in one launch, on CUDA.

    python tests/bench/kv_step.py [--rows 1 8 32 128] [--context 300 2000 8000] [--tokens 1] [--heads 32 8 64]

Through the caches that the engine uses, so masks, places and starts are part of it, made once for 16 layers as in a
model. Rows have different lengths, as in a batch. Microseconds a layer of a step: the median of 20 steps, each of which
is started before the one before it is waited for; `host` is the part that the host is busy with it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv.attention import attend
from runner.engine.kv.attention_kernel import attend_and_write
from runner.engine.kv.calls import Launch
from runner.engine.kv.layers import Straight
from runner.engine.kv.positions import Positions
from tests.bench.geometry import on_gpu

LAYERS = 16
STEPS = 20


class Step:
    """Steps of so many rows, of about `context` tokens each, one after the other."""

    def __init__(self, launch: Launch | None, rows: int, context: int, tokens: int, heads: list[int]) -> None:
        self._tokens, (query_heads, groups, width) = tokens, heads
        self._positions = Positions(rows)
        lengths = [context - 7 * row % 50 for row in range(rows)]
        self._positions.restart(lengths, list(lengths))
        self._positions.reserve(context + (STEPS + 4) * tokens)
        self._layers = [Straight(self._positions, launch) for _ in range(LAYERS)]
        dtype = mx.bfloat16 if on_gpu() else mx.float32
        self._input = mx.random.normal((rows, tokens, query_heads + 2 * groups, width)).astype(dtype)
        self._heads, self._groups, self._scale = query_heads, groups, width**-0.5
        mx.eval(self._input)

    def __call__(self) -> mx.array:
        """What the last layer attends to, of queries that come from the layer before."""
        self._positions.begin(self._tokens, None)
        projected = self._input.swapaxes(1, 2)
        queries, keys, values = mx.split(projected, [self._heads, self._heads + self._groups], axis=1)
        for layer in self._layers:
            layer.begin()
            mask = layer.make_mask(self._tokens)
            queries = attend(queries, *layer.update_and_fetch(keys, values), layer, self._scale, mask)
            layer.end()
        self._positions.end()
        return queries


def measured(step: Step) -> tuple[float, float]:
    """Seconds of a step, and those of them that the host is busy."""
    for _ in range(3):
        mx.eval(step())
    before, took, busy = step(), [], []
    start(before)
    for _ in range(STEPS):
        began = time.perf_counter()
        following = step()
        start(following)
        busy.append(time.perf_counter() - began)
        mx.eval(before)
        took.append(time.perf_counter() - began)
        before = following
    mx.eval(before)
    return statistics.median(took), statistics.median(busy)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128] if on_gpu() else [1, 4])
    parser.add_argument("--context", type=int, nargs="+", default=[300, 2000, 8000] if on_gpu() else [300])
    parser.add_argument("--tokens", type=int, default=1, help="a row; more than one as when a draft's are verified")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "WIDTH"))
    arguments = parser.parse_args()
    ways: dict[str, Launch | None] = {"separate operations": None}
    if mx.cuda.is_available():
        ways["one launch"] = attend_and_write
    print(f"{mx.default_device()}, MLX {mx.__version__}, heads {arguments.heads}, {arguments.tokens} tokens a row")
    print(f"{'':<36} {'µs a layer':>12} {'host':>8}")
    for context in arguments.context:
        for rows in arguments.rows:
            if rows * context > 1 << 19:
                continue
            for name, launch in ways.items():
                took, busy = measured(Step(launch, rows, context, arguments.tokens, arguments.heads))
                per = [1e6 * seconds / LAYERS for seconds in (took, busy)]
                print(f"{rows:>4} rows {context:>6} {name:<19} {per[0]:>12.1f} {per[1]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
