"""The launch that packs, writes and attends to packed keys, part by part against numpy, and what it takes.

    python tests/bench/packed_launch.py [--bits 8 4] [--context 16000] [--heads 32 8 64] [--repeat 5]
        [--cases 1x16384 4x16384 8x2048] [--ways 4,4,2 …] [--unchecked] [--phases]

First what is right: the codes, scales and biases that it writes for new tokens, against `mx.quantize` of the same keys
(rotated in float64) and values; and what is attended to, against float64 on what the planes say then. Each for one and
five tokens a row, with starts in the hundreds and at the context, and with keys shared by one block and by many.
`codes` is the share of codes that are others, and by how much at most; `scales`, `biases` and `attended` are the mean
and the largest error, relative to the mean size of what is right.

Then `gpu`: microseconds of the device a launch, in a chain of 50 over so many layers that no cache holds them, while
the device waits until the host has started all; `attention_kernel`'s in bfloat16 beside it. Medians. A case is rows and
tokens of each. A way is warps and stages of a block, and for how many blocks a multiprocessor rows' keys are shared;
the engine's own has a star. `--phases` says what a block's time goes to (`packed_phases.py`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine import kernel_cache
from runner.engine.kv import attention_kernel, quantised_kernel
from runner.engine.kv.calls import Call
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall
from tests.bench.packed_checks import Heads, check, drawn, planes_of, turning
from tests.bench.product_kernel import timed, waiting
from tests.bench.record import progress

CHAIN = 50
CACHE = 250_000_000
"""Bytes of planes that no cache holds."""

GROUP = 64
"""Values that share a scale."""

SHAPE = quantised_kernel.shape
"""The engine's own."""


def chain(one: Callable[[int, mx.array | None], mx.array]) -> mx.array:
    after = None
    for i in range(CHAIN):
        after = one(i, after)
    assert after is not None
    return after


def packed_chain(how: Quantisation, heads: Heads, rows: int, context: int) -> tuple[Callable[[], mx.array], int]:
    """A chain of launches, and the bytes that each has to read."""
    places = -(-(context + 8) // 256) * 256
    size = rows * context * heads[1] * heads[2] * 2 * (how.bits / 8 + 4 / how.group_size)
    layers = [planes_of(how, rows, heads, places, mx.bfloat16) for _ in range(max(1, -(-CACHE // int(size))))]
    new, rotation = drawn(rows, 1, heads, mx.bfloat16), turning(heads[2])
    at = mx.array([context] * rows, dtype=mx.int32)

    def one(i: int, after: mx.array | None) -> mx.array:
        planes = layers[i % len(layers)]
        rest = at, heads[2] ** -0.5, None, how.bits, how.group_size, after, rotation
        return quantised_kernel.attend_and_write(PackedCall(*new, planes, *rest))[0]

    return lambda: chain(one), int(size)


def plain_chain(heads: Heads, rows: int, context: int) -> tuple[Callable[[], mx.array], int]:
    """The same for plain keys."""
    places = -(-(context + 8) // 256) * 256
    size = rows * context * heads[1] * heads[2] * 4
    shape = rows, heads[1], places, heads[2]
    layers = [
        tuple(mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)) for _ in range(max(1, -(-CACHE // size)))
    ]
    mx.eval(layers)
    new, rotation = drawn(rows, 1, heads, mx.bfloat16), turning(heads[2])
    at = mx.array([context] * rows, dtype=mx.int32)

    def one(i: int, after: mx.array | None) -> mx.array:
        planes = layers[i % len(layers)]
        call = Call(*new, planes, at, heads[2] ** -0.5, None, None, after, rotation)  # type: ignore[arg-type]
        return attention_kernel.attend_and_write(call)[0]

    return lambda: chain(one), size


def take(way: str) -> None:
    """Have launches do it so."""
    warps, stages, blocks = (0, 0, 0) if way == "*" else map(int, way.split(","))

    def shape(*what: Any) -> quantised_kernel.Shape | None:
        found = SHAPE(*what)
        return replace(found, warps=warps, stages=stages, at_once=blocks) if found is not None and warps else found

    quantised_kernel.shape = shape  # type: ignore[assignment]


def prepare(heads: Heads, bits: Sequence[int], ways: Sequence[str]) -> None:
    """Have the kernels of steps compiled, side by side."""
    queries, groups, width = heads
    for n, way in itertools.product(bits, ways):
        take(way)
        found = quantised_kernel.shape(width, 2, (n, GROUP), queries, groups, 1)
        assert found is not None
        sizes = quantised_kernel.constants(width, n, GROUP, 0, found)
        rotation = attention_kernel.rotating(turning(width))[1]
        quantised_kernel._kernel(width**-0.5, mx.bfloat16, sizes, found.shared_memory, rotation)


def time_all(heads: Heads, case: tuple[int, int], bits: Sequence[int], ways: Sequence[str], repeat: int) -> None:
    chains = {"bfloat16": plain_chain(heads, *case)}
    chains |= {f"{n} bits": packed_chain(Quantisation(n, GROUP), heads, *case) for n in bits}
    for name, (build, size) in chains.items():
        for way in ways if "bits" in name else ways[:1]:
            take(way)
            gpu, host = timed(build, repeat)
            each = gpu / CHAIN
            rate = f"gpu {each:.2f} µs, {size / each / 1e3:.0f} GB/s; host {host / CHAIN:.2f} µs"
            progress(f"{case[0]} rows of {case[1]}, {name} {way}: {rate}")


def case_of(name: str) -> tuple[int, int]:
    rows, context = name.split("x")
    return int(rows), int(context)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--context", type=int, default=16000)
    parser.add_argument("--cases", type=case_of, nargs="+", default=[(1, 16384), (4, 16384), (8, 2048)])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "WIDTH"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=[], metavar="WARPS,STAGES,BLOCKS")
    parser.add_argument("--unchecked", action="store_true", help="only time")
    parser.add_argument("--phases", action="store_true", help="what a block's time goes to, of the engine's own way")
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    kernel_cache.settle()
    mx.random.seed(1)
    mx.eval(waiting())
    heads: Heads = tuple(arguments.heads)
    progress("compiled what waits")
    if not arguments.unchecked:
        for bits in arguments.bits:
            check(quantised_kernel.attend_and_write, Quantisation(bits, GROUP), heads, arguments.context, mx.bfloat16)
    if arguments.phases:
        from tests.bench.packed_phases import show

        for case in arguments.cases:
            show(heads, case, arguments.bits)
    if arguments.ways:
        prepare(heads, arguments.bits, arguments.ways)
    for case in arguments.cases:
        time_all(heads, case, arguments.bits, ["*", *arguments.ways], arguments.repeat)


if __name__ == "__main__":
    main()
