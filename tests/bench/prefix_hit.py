"""What the prefix cache saves: time to the first token of a prompt whose beginning is known, against the cold one.

    python tests/bench/prefix_hit.py [--prompt 4096] [--repeat 5]

On a GPU with the geometry of Llama-3.2-1B, else with a small one; random weights. The engine's own loop, without HTTP.
"again" is the same prompt once more, "next turn" goes on from the answer, "shared" begins with the same 7/8 and goes on
differently, "quantised" is "next turn" with an 8-bit cache. Medians; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import load
from tests.bench.geometry import on_gpu
from tests.bench.llama_1b import build
from tests.engine.drive import Driver, generate
from tests.engine.tiny import build_model

LIMIT = 8 << 30
SMALL = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 32768}
"""Geometry on the CPU."""


def first_token(driver: Driver, prompt: list[int], expected: int) -> float:
    """Seconds from the request to its first token; `expected` of the prompt have to be cached."""
    number = len(driver.answers)
    began = time.perf_counter()
    driver.engine.submit(generate(number, prompt=prompt, max_tokens=2))
    while number not in driver.answers:
        driver.engine.step()
    seconds = time.perf_counter() - began
    usage = driver.drain()[number].usage
    assert usage is not None
    assert abs(usage.cached_tokens - expected) <= 2, usage
    return seconds


def tokens(seed: int, count: int) -> list[int]:
    """A prompt of its own."""
    return [(seed * 7919 + i * (seed + 3)) % 350 + 6 for i in range(count)]


def measure(driver: Driver, length: int, repeat: int) -> dict[str, list[float]]:
    """Seconds, by the way of asking."""
    found: dict[str, list[float]] = {"cold": [], "again": [], "next turn": [], "shared": []}
    first_token(driver, tokens(1000, length), 0)
    for seed in range(repeat):
        prompt, common = tokens(seed, length), length * 7 // 8
        found["cold"].append(first_token(driver, prompt, 0))
        found["again"].append(first_token(driver, prompt, length - 1))
        found["next turn"].append(first_token(driver, [*prompt, *tokens(seed + 50, 40)], length))
        found["shared"].append(first_token(driver, [*prompt[:common], *tokens(seed + 100, length - common)], common))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch)) if on_gpu() else build_model(Path(scratch), config=SMALL)
        limits = {"prefix_cache_bytes": LIMIT, "prefill_step_size": 512}
        found = measure(Driver(load(folder), **limits), arguments.prompt, arguments.repeat)
        packed = load(folder, quantisation=Quantisation(8, 32))
        quantised = measure(Driver(packed, **limits), arguments.prompt, arguments.repeat)
    found["quantised"] = quantised["next turn"]
    cold = statistics.median(found["cold"])
    print(f"{mx.default_device()}, prompts of {arguments.prompt} tokens")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{name:<10} {median * 1000:>9.1f} ms  {median / cold:>6.3f} of cold")


if __name__ == "__main__":
    main()
