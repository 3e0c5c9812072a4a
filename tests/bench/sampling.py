"""What choosing tokens costs: milliseconds a step, by rows, vocabulary and way of sampling.

    python tests/bench/sampling.py [--rows 1 32 128] [--vocabulary 32000 128256] [--ways greedy top_p …] [--flat]

Every row samples the same way, from logits of the type that a model gives on this device (bfloat16 on a GPU, float32 on
the CPU), spread as a trained model's are: a few tokens have nearly all of the probability. With `--flat` they are as of
random weights: filters keep tens of thousands. On CUDA, `MLX_RUN_DRAW_KERNEL=0` draws by separate operations.

A figure is the median over `repeat` runs of `steps` steps, each of which is dispatched before the one before it is
read, as in the engine. `host` is the part of it that the host is busy, `ops` the number of operations in the graph of a
step, views included.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine.arrays import start, to_list  # noqa: E402
from runner.engine.grammar.masks import Mask  # noqa: E402
from runner.engine.sampling import Sampler, SamplingRow  # noqa: E402
from runner.protocol import Sampling  # noqa: E402

WARM = {"temperature": 0.7}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "grammar": {},
    "temperature": WARM,
    "top_p": {**WARM, "top_p": 0.9},
    "min_p": {**WARM, "min_p": 0.05},
    "top_k": {**WARM, "top_k": 40},
    "all three": {**WARM, "top_p": 0.9, "min_p": 0.05, "top_k": 40},
    "repetition": {**WARM, "repetition_penalty": 1.1},
    "presence": {**WARM, "presence_penalty": 0.5},
    "logprobs": {**WARM, "logprobs": 5},
}


class Case:
    """One way of sampling for so many rows."""

    def __init__(self, way: str, rows: int, vocabulary: int, *, flat: bool) -> None:
        settings = Sampling(**WAYS[way])
        self._sampler = Sampler([SamplingRow(settings, row, [1, 2, 3], [4], True) for row in range(rows)], vocabulary)
        self._dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
        noise = mx.random.normal((rows, vocabulary))
        self._logits = (noise if flat else noise**3).astype(self._dtype)
        self._tokens = mx.zeros((rows,), dtype=mx.uint32)
        self._mask: Mask | None = None
        if way == "grammar":
            self._mask = Mask(mx.random.randint(0, 256, (rows, 1, vocabulary // 32 * 4)).astype(mx.uint8), None)
        mx.eval(self._logits, self._tokens, *(() if self._mask is None else (self._mask.packed,)))

    def step(self) -> mx.array:
        """One step's tokens, not started yet."""
        self._tokens, logprobs = self._sampler(self._logits, self._tokens, self._mask)
        self._outputs = [self._tokens, *(() if logprobs is None else logprobs.arrays())]
        return self._tokens

    def run(self, steps: int) -> tuple[float, float]:
        """Milliseconds a step, and those of them that the host was busy."""
        busy = 0.0
        before: mx.array | None = None
        started = time.perf_counter()
        for _ in range(steps):
            begun = time.perf_counter()
            self.step()
            start(*self._outputs)
            busy += time.perf_counter() - begun
            if before is not None:
                to_list(before)
            before = self._tokens
        assert before is not None
        to_list(before)
        return (time.perf_counter() - started) * 1000 / steps, busy * 1000 / steps

    def operations(self) -> int:
        """In the graph of one step."""
        self.step()
        start(*self._outputs)
        mx.synchronize()
        self.step()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "graph.dot")
            mx.export_to_dot(str(path), *self._outputs)
            labels = re.findall(r'label ?= ?"(\w+)", shape=rectangle', path.read_text())
        mx.eval(self._outputs)
        return len(labels)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    print(f"mlx {mx.__version__} on {mx.default_device()}; ms a step, median of {arguments.repeat}")
    print(f"{'vocabulary':>10} {'rows':>5} {'way':<12} {'step':>9} {'host':>9} {'ops':>4}")
    for vocabulary in arguments.vocabulary:
        for rows in arguments.rows:
            for way in arguments.ways:
                case = Case(way, rows, vocabulary, flat=arguments.flat)
                operations = case.operations()
                runs = [case.run(arguments.steps) for _ in range(arguments.repeat)]
                step, host = (statistics.median(values) for values in zip(*runs, strict=True))
                print(f"{vocabulary:>10} {rows:>5} {way:<12} {step:>9.3f} {host:>9.3f} {operations:>4}", flush=True)


if __name__ == "__main__":
    main()
