"""What an operation costs the host on a GPU: chains of one kind, built and started, in microseconds an operation.

    python tests/bench/launch_cost.py [--count 200] [--repeat 15] [--kinds add norm …]

`build` is Python and the array's graph, `start` what `async_eval` takes, `all` the time until the result is there.
Medians. A variable such as MLX_USE_CUDA_GRAPHS or MLX_MAX_OPS_PER_BUFFER that the caller has set is shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine import kernel_cache
from runner.engine.arrays import start
from runner.engine.cuda_kernels import Kernel
from runner.engine.cuda_text import Template

WIDTH = 2048
LONG = 8000
"""Characters, as many as a kernel of ours has."""

_SOURCE = "const int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < x_shape[0] * x_shape[1]) out[i] = x[i];"
_CONSTANTS = [("T", mx.bfloat16), *((f"UNUSED_{i}", i) for i in range(11))]

Operation = Callable[[mx.array], mx.array]


def called(made: Any, **more: Any) -> Operation:
    """A launch of it."""

    def call(x: mx.array) -> mx.array:
        (out,) = made(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
            **more,
        )
        return out

    return call


def kernels() -> dict[str, Operation]:
    """Copies: of a short and a long text as MLX has them, and of the same long text as the engine has it launched."""

    def source(length: int) -> str:
        return f"{_SOURCE}\n//{'-' * length}"

    def mlx(length: int, **more: Any) -> Operation:
        names = {"input_names": ["x"], "output_names": ["out"]}
        return called(mx.fast.cuda_kernel(name=f"copy_{length}", source=source(length), **names), **more)

    def ours(template: Template = ()) -> Operation:
        types = {"inputs": {"x": mx.bfloat16}, "outputs": {"out": mx.bfloat16}}
        return called(Kernel(name="copy_ours", source=source(LONG), template=template, **types).launch)

    return {
        "kernel of 200 characters": mlx(0),
        f"kernel of {LONG:,} characters": mlx(LONG),
        f"{LONG:,} characters, 12 constants": mlx(LONG, template=_CONSTANTS),
        f"{LONG:,} characters, ours": ours(),
        f"{LONG:,}, 12 constants, ours": ours(_CONSTANTS),
    }


def kinds() -> dict[str, tuple[mx.array, Operation]]:
    """An input and an operation that returns one of its kind."""
    one, eight, many = (mx.random.normal((rows, WIDTH)).astype(mx.bfloat16) for rows in (1, 8, 32))
    weight = (mx.random.normal((WIDTH, WIDTH)) * WIDTH**-0.5).astype(mx.bfloat16)
    gain = mx.ones((WIDTH,), dtype=mx.bfloat16)
    table = mx.zeros((8, 4, 512, 64), dtype=mx.bfloat16)
    mx.eval(one, eight, many, weight, gain, table)
    made: dict[str, tuple[mx.array, Operation]] = {
        "add": (eight, lambda x: x + gain),
        "norm": (eight, lambda x: mx.fast.rms_norm(x, gain, 1e-5)),
        "product, 1 row": (one, lambda x: x @ weight.T),
        "product, 8 rows": (eight, lambda x: x @ weight.T),
        "product, 32 rows": (many, lambda x: x @ weight.T),
    }
    if mx.cuda.is_available():
        made |= {name: (eight, operation) for name, operation in kernels().items()}
    return made


def measure(x: mx.array, call: Operation, count: int, repeat: int) -> list[float]:
    """Median microseconds an operation: build, start, all."""
    times: list[tuple[float, ...]] = []
    for _ in range(repeat + 3):
        began = time.perf_counter()
        y = x
        for _ in range(count):
            y = call(y)
        built = time.perf_counter()
        start(y)
        started = time.perf_counter()
        mx.eval(y)
        times.append((built - began, started - built, time.perf_counter() - began))
    return [statistics.median(column) / count * 1e6 for column in zip(*times[3:], strict=True)]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--kinds", nargs="+")
    arguments = parser.parse_args()
    kernel_cache.settle()
    shown = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MLX_"))
    print(f"{mx.default_device()}, {arguments.count} operations, median of {arguments.repeat}; {shown}")
    print(f"{'':34} {'build':>7} {'start':>7} {'all':>7}")
    for name, (x, call) in kinds().items():
        if not arguments.kinds or any(name.startswith(kind) for kind in arguments.kinds):
            figures = measure(x, call, arguments.count, arguments.repeat)
            print(f"{name:34} " + " ".join(f"{figure:>7.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
