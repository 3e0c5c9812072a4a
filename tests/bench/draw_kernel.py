"""What a launch of the draw takes on CUDA, by rows, logits and way of sampling.

    python tests/bench/draw_kernel.py [--rows 1 8 32 128] [--vocabulary 128256] [--beside OTHER.py] [--repeat 5]

`gpu` is microseconds of the device a launch, in a chain in which each launch has to wait for the one before: its tokens
are the next one's positions. A kernel that only waits keeps the device busy until the host has handed it the chain.
`host` is what building and starting a launch took meanwhile. Logits are in bfloat16: `flat` as of random weights
(filters keep tens of thousands), `peaked` with four tokens that have nearly all of the probability. `--beside` takes
another runner/engine/draw_kernel.py, such as `git show COMMIT:runner/engine/draw_kernel.py` has it (with what it
imports still there): its `beside` is next to ours, and `equal` how many tokens the chains agree on.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine import draw_kernel, kernel_cache
from runner.engine.draw import Draw
from runner.engine.sampling import SamplingRow
from runner.protocol import Sampling
from tests.bench.product_kernel import WAIT, timed, waiting

LOGITS = ("flat", "peaked")
WAYS: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 0.7, "top_k": 40},
}
CHAIN = 24
"""Launches; the host has to start them while the device waits."""

DrawTokens = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class Case:
    """What a launch takes, [rows, 1, vocabulary] logits first."""

    logits: mx.array
    settings: mx.array
    keys: mx.array

    @classmethod
    def of(cls, kind: str, way: str, rows: int, vocabulary: int) -> Case:
        logits = mx.random.normal((rows, 1, vocabulary), key=mx.random.key(rows)) * (1.5 if kind == "flat" else 2.5)
        if kind == "peaked":
            # Anywhere, and each row's elsewhere.
            at = (mx.arange(rows)[:, None] * 7919 + mx.arange(4) * 30011) % vocabulary
            logits = mx.put_along_axis(logits, at[:, None], mx.array([[[20.0, 19.0, 18.5, 17.0]]]), axis=-1)
        draw = Draw([SamplingRow(Sampling(**WAYS[way]), row, [1], [], False) for row in range(rows)], vocabulary)
        case = cls(logits.astype(mx.bfloat16), draw.settings, draw.keys_of(0))
        mx.eval(case.logits, case.settings, case.keys)
        return case

    def chain(self, draw_tokens: DrawTokens, count: int = CHAIN) -> list[mx.array]:
        """Each launch's tokens, [rows, 1]."""
        tokens = [mx.zeros(self.logits.shape[:2], dtype=mx.uint32)]
        for _ in range(count):
            tokens.append(draw_tokens(self.logits, self.settings, self.keys, tokens[-1]))
        return tokens[1:]


def other(path: Path) -> DrawTokens:
    """The kernel of another file."""
    spec = importlib.util.spec_from_file_location("other_draw_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: DrawTokens = module.draw_tokens
    return found


def measure(draw_tokens: DrawTokens, case: Case, repeat: int) -> tuple[float, float, bool]:
    """Microseconds of the device and of the host a launch, and whether the host was ahead of the device."""
    gpu, host = timed(lambda: case.chain(draw_tokens)[-1], repeat)
    return gpu / CHAIN, host / CHAIN, host < WAIT / 1000


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--beside", type=Path, default=None)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    kernel_cache.settle()
    beside = None if arguments.beside is None else other(arguments.beside)
    mx.eval(waiting())
    print(f"{'rows':>5} {'logits':<7} {'way':<12} {'gpu':>8} {'host':>6} {'beside':>8} {'equal':>9}")
    for rows in arguments.rows:
        for kind in LOGITS:
            for way in arguments.ways:
                case = Case.of(kind, way, rows, arguments.vocabulary)
                gpu, host, ahead = measure(draw_kernel.draw_tokens, case, arguments.repeat)
                line = f"{rows:>5} {kind:<7} {way:<12} {gpu:>8.1f} {host:>6.1f}"
                if beside is not None:
                    mine, theirs = (mx.stack(case.chain(kernel)) for kernel in (draw_kernel.draw_tokens, beside))
                    equal = f"{mx.sum(mine == theirs).item()}/{mine.size}"
                    line += f" {measure(beside, case, arguments.repeat)[0]:>8.1f} {equal:>9}"
                print(line + ("" if ahead else "  (the host is the limit)"), flush=True)


if __name__ == "__main__":
    main()
