"""What the prefix cache saves: time to the first token of a prompt whose beginning is known, against the cold one.

    python tests/bench/prefix_hit.py [--prompt 4096] [--repeat 5]

On a GPU with the geometry of Llama-3.2-1B, else with a small one; random weights, drawn on the device. The engine's own
loop, without HTTP. "again" is the same prompt once more, "next turn" goes on from the answer, "shared" begins with the
same 7/8 and goes on differently; then all of it with an 8-bit cache. Medians; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel
from tests.bench.geometry import GEOMETRIES, usual
from tests.bench.in_memory import draw, layout_of
from tests.bench.record import Budget, Record, add_options, progress
from tests.engine.drive import Driver, generate

LIMIT = 8 << 30
WAYS = ("cold", "again", "next turn", "shared")


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


def ask(driver: Driver, seed: int, length: int) -> dict[str, float]:
    """Seconds, by the way of asking, with a prompt of the seed's own."""
    prompt, common = tokens(seed, length), length * 7 // 8
    return {
        "cold": first_token(driver, prompt, 0),
        "again": first_token(driver, prompt, length - 1),
        "next turn": first_token(driver, [*prompt, *tokens(seed + 50, 40)], length),
        "shared": first_token(driver, [*prompt[:common], *tokens(seed + 100, length - common)], common),
    }


def measure(model: LoadedModel, label: str, arguments: argparse.Namespace, budget: Budget) -> dict[str, list[float]]:
    """Seconds of each repetition, by the way of asking. The first time of each way, which compiles, does not count."""
    driver = Driver(model, prefix_cache_bytes=LIMIT, prefill_step_size=512)
    warm = ask(driver, 1000, arguments.prompt)
    progress(f"{label}: warm, " + ", ".join(f"{way} {seconds * 1000:.0f} ms" for way, seconds in warm.items()))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(arguments.repeat):
        for way, seconds in ask(driver, seed, arguments.prompt).items():
            found[way].append(seconds)
        progress(f"{label}: " + ", ".join(f"{way} {found[way][-1] * 1000:.0f} ms" for way in WAYS))
        if budget.over:
            break
    return found


def write(record: Record, label: str, found: dict[str, list[float]]) -> None:
    """A row a way."""
    cold = statistics.median(found["cold"])
    for way, seconds in found.items():
        median = statistics.median(seconds)
        cells = {"cache": label, "prompt": way, "ms": f"{median * 1000:.1f}", "of cold": f"{median / cold:.3f}"}
        record.row(cells, {"cache": label, "way": way, "seconds": seconds, "ratio": median / cold})


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default=usual())
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    add_options(parser)
    arguments = parser.parse_args()
    budget = Budget(arguments.budget)
    progress(f"{mx.default_device()}, {arguments.geometry}, prompts of {arguments.prompt} tokens")
    title = f"time to the first token of a prompt of {arguments.prompt} tokens"
    record = Record(arguments.record, "prefix", title)
    with tempfile.TemporaryDirectory() as scratch:
        plain = draw(Path(scratch), arguments.geometry)
    progress("weights are drawn")
    write(record, "16 bits", measure(plain, "16 bits", arguments, budget))
    if budget.over:
        record.left_out("8 bits")
        return
    packed = replace(plain, layout=layout_of(plain.model, Quantisation(8, 32)))
    write(record, "8 bits", measure(packed, "8 bits", arguments, budget))
    record.finish()


if __name__ == "__main__":
    main()
