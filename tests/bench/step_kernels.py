"""What a decode step's kernels take on a CUDA GPU, by torch's profiler, which sees every process' own.

    python tests/bench/step_kernels.py [--geometry llama-1b] [--rows 8 32 128] [--adapters 9] [--rank 8]
        [--only base|mixed] [--names 12]

The engine's own loop on a model of random weights, prompts of about 256 tokens, at temperature 0.7 with top_p 0.9: rows
of the base model, then rows that take adapters (on all linear layers) and none in turn. For each,
milliseconds of a step without the profiler and with it, those that the device is busy, and the kernels that take most:
microseconds a step, how often a step, and microseconds each. Needs torch with CUDA, beside MLX's CUDA build.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

try:
    # Before MLX: the profiler sees nothing of a device that others have begun to use.
    import torch

    torch.cuda.init()
except (ImportError, AssertionError, RuntimeError) as missing:
    sys.exit(f"torch's profiler is what this asks: {missing}")

import mlx.core as mx  # noqa: E402

from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.protocol import Generate, Sampling  # noqa: E402
from tests.bench.engine_throughput import draw_adapters, prompt  # noqa: E402
from tests.bench.geometry import GEOMETRIES  # noqa: E402
from tests.bench.in_memory import draw  # noqa: E402

STEPS: Final = 24
SAMPLING: Final = Sampling(temperature=0.7, top_p=0.9)


def fill(engine: Engine, rows: int, keys: list[str]) -> None:
    """Have so many rows decode, and whatever is built or compiled for them done."""
    for row in range(rows):
        words = prompt(row, 256 - 7 * row % 50)
        request = Generate(
            id=row, prompt=words, max_tokens=3 * STEPS + 60 + rows, adapter=keys[row % len(keys)], sampling=SAMPLING
        )
        engine.submit(request)
    while engine.stats().rows < rows:
        engine.step()
    for _ in range(16):
        engine.step()


def steps(engine: Engine) -> float:
    """Milliseconds of one, the device's part included."""
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    mx.synchronize()
    return (time.perf_counter() - began) / STEPS * 1e3


def profiled(engine: Engine) -> tuple[float, dict[str, list[float]]]:
    """The same under the profiler, and each kernel's microseconds."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        milliseconds = steps(engine)
    for event in seen.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            found[re.sub(r"<.*", "", event.name)[:70]].append(event.time_range.elapsed_us())
    return milliseconds, found


def show(engine: Engine, rows: int, kind: str, keys: list[str], names: int) -> None:
    """One batch."""
    for _ in range(2):  # the first compiles
        fill(engine, rows, keys)
        plain = steps(engine)
        milliseconds, found = profiled(engine)
        engine.cancel_all()
        while engine.busy:
            engine.step()
    busy = sum(map(sum, found.values())) / STEPS / 1e3
    print(f"{rows} rows, {kind}: {plain:.3f} ms a step, {milliseconds:.3f} profiled, device {busy:.3f}", flush=True)
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:names]:
        print(f"  {sum(times) / STEPS:8.1f} µs {len(times) / STEPS:6.1f} × {sum(times) / len(times):7.2f}  {name}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-1b")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--adapters", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", choices=("base", "mixed"))
    parser.add_argument("--names", type=int, default=12)
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        sys.exit("MLX has no CUDA device")
    with tempfile.TemporaryDirectory() as scratch:
        loaded = draw(Path(scratch), arguments.geometry)
        engine = Engine(loaded, Limits(max_rows=max(arguments.rows), prefix_cache_bytes=0), lambda _: None)
        adapters = draw_adapters(loaded, Path(scratch), arguments.adapters, arguments.rank)
        keys = ["", *(engine.load_adapter(source).key for source in adapters)]
        for rows in arguments.rows:
            for kind, chosen in (("base", keys[:1]), ("mixed", keys)):
                if arguments.only in (None, kind):
                    show(engine, rows, kind, chosen, arguments.names)


if __name__ == "__main__":
    main()
