"""Ways to multiply a few tokens with a weight on CUDA, to choose among in runner/engine/product_kernel.py, and for more
than 32 of them in runner/engine/wide_product_kernel.py.

    python tests/bench/product_kernel.py [--rows 1 8 16 32] [--shapes 2048x2048 …] [--ways 8,2,1 …] [--seconds 60]

A way is warps, stages, mtiles; beyond 32 rows groups, stages, splits. `gpu` is microseconds of the device a product,
in a chain in which each product has to wait for the one before, over so many weights that the second cache does not
hold them; a kernel that only waits keeps the device busy until the host has handed it the whole chain. `host` is what
building and starting one took meanwhile.
`error` is the largest against float32, relative to the spread of the result. `swiglu` is the fused product of gate and
input with what follows, `swiglu apart` the same in MLX's operations. Medians; the ways the engine takes have a star.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from runner.engine import kernel_cache, product_kernel, wide_product_kernel
from runner.engine.cuda_kernels import PROCESSORS
from runner.engine.product_kernel import TILES, Way
from runner.engine.wide_product_kernel import TOKENS
from runner.engine.wide_product_kernel import Way as WideWay
from tests.bench.record import Budget, progress

SHAPES = ("3072x2048", "2048x2048", "16384x2048", "2048x8192", "128256x2048")
WAYS = ("8,2,1", "8,4,1", "16,2,1", "16,3,1", "4,4,2", "8,2,2", "8,3,2", "16,2,2")
WIDE = (
    "1,4,1",
    "1,8,1",
    "1,8,2",
    "1,4,4",
    "1,8,4",
    "2,4,1",
    "2,6,1",
    "2,8,1",
    "2,4,4",
    "2,6,4",
    "2,6,8",
    "4,4,1",
    "4,5,1",
)
CACHE = 200_000_000
"""Bytes of weights that no cache holds."""

CHAIN = 48
WAIT = 4_000_000
"""Nanoseconds that the device waits: more than the host takes for a chain."""

Product = Callable[[mx.array, mx.array], mx.array]


def waiting() -> mx.array:
    """A kernel that keeps the device busy for WAIT."""
    made = mx.fast.cuda_kernel(
        name="wait_a_while",
        input_names=["x"],
        output_names=["out"],
        source="""
            unsigned long long began, now;
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
            do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - began < NANOSECONDS);
            out[0] = x[0];
        """,
    )
    (out,) = made(
        inputs=[mx.zeros((1,))],
        template=[("NANOSECONDS", WAIT)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
    )
    return out


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds a product, and whether the host had started all before the device had waited."""

    gpu: float
    host: float
    ahead: bool


def chain(product: Product, x: mx.array, weights: list[mx.array], count: int) -> mx.array:
    """Each product's tokens are made of what the one before gave, at no cost where it is as wide."""
    y = x
    for i in range(count):
        y = following(x, product(y, weights[i % len(weights)]))
    return y


def following(x: mx.array, y: mx.array) -> mx.array:
    return y.reshape(-1)[: x.size].reshape(x.shape) if y.size >= x.size else x + y[0, 0]


def measure(product: Product, x: mx.array, weights: list[mx.array], outputs: int, repeat: int) -> Figures:
    count = max(8, min(CHAIN, int(12e9 / weights[0].nbytes)))
    narrow = outputs * x.shape[0] < x.size
    # What chains them, where that costs something: an addition.
    between = timed(lambda: chain(lambda y, _: y, x, weights, count), repeat)[0] if narrow else 0.0
    gpu, host = timed(lambda: chain(product, x, weights, count), repeat)
    return Figures((gpu - between) / count, host / count, host < WAIT / 1000)


def timed(build: Callable[[], mx.array], repeat: int) -> tuple[float, float]:
    """Microseconds of the device and of the host."""
    device, host = [], []
    mx.eval(build())
    for _ in range(repeat):
        alone = waiting()
        began = time.perf_counter()
        mx.eval(alone)
        waited = time.perf_counter() - began
        blocker = waiting()
        began = time.perf_counter()
        mx.async_eval(blocker)
        begun = time.perf_counter()
        y = build()
        mx.async_eval(y)
        started = time.perf_counter()
        mx.eval(y)
        device.append((time.perf_counter() - began - waited) * 1e6)
        host.append((started - begun) * 1e6)
    return statistics.median(device), statistics.median(host)


def error(product: Product, x: mx.array, weight: mx.array, gated: bool) -> float:
    exact = x.astype(mx.float32) @ weight.astype(mx.float32).T
    if gated:
        exact = swiglu(*mx.split(exact, 2, axis=-1))
    spread = mx.sqrt(mx.mean(exact * exact))
    return float(mx.max(mx.abs(product(x, weight).astype(mx.float32) - exact)) / spread)


def candidates(outputs: int, inputs: int, rows: int, names: list[str]) -> Iterator[tuple[str, int, Product, bool]]:
    """Names, outputs, products and whether they are gated."""
    made = narrow if rows <= product_kernel.MOST_ROWS else wide
    yield "x @ w.T", outputs, lambda x, w: x @ w.T, False
    for name, product in made(outputs, inputs, rows, "plain", names):
        yield name, outputs, product, False
    if outputs != 16384:
        return
    half = outputs // 2
    yield "swiglu apart", half, lambda x, w: swiglu(*mx.split(x @ w.T, 2, axis=-1)), True
    for name, product in made(half, inputs, rows, "swiglu", names):
        yield f"swiglu {name}", half, product, True


def narrow(outputs: int, inputs: int, rows: int, epilogue: str, names: list[str]) -> Iterator[tuple[str, Product]]:
    """Those of up to 32 rows, that fit."""
    tiles, parts = next(tiles for tiles in TILES if rows <= tiles * 8), 2 if epilogue == "swiglu" else 1
    usual = product_kernel.way(outputs, inputs, tiles, epilogue)
    for way in (Way(*numbers(name)) for name in names or WAYS):
        if outputs * parts % (16 * way.mtiles) == 0 and way.mtiles % parts == 0:
            product = product_kernel.multiply(outputs, inputs, mx.bfloat16, epilogue, fixed(way))
            yield f"{way.warps},{way.stages},{way.mtiles}{'*' * (way == usual)}", product


def wide(outputs: int, inputs: int, rows: int, epilogue: str, names: list[str]) -> Iterator[tuple[str, Product]]:
    """Those of more, that fit."""
    most, parts = next(most for most in TOKENS if rows <= most), 2 if epilogue == "swiglu" else 1
    usual = wide_product_kernel.way(outputs, inputs, most, epilogue)
    for way in (WideWay(*numbers(name)) for name in names or WIDE):
        room = most * (way.groups * 64 + 4) * 4 <= way.shared_memory(most) - 1024 <= 225 * 1024
        blocks, left = divmod(outputs * parts, way.groups * 64)
        if room and left == 0 and (way.splits == 1 or blocks * way.splits <= 2 * PROCESSORS):
            product = wide_product_kernel.multiply(outputs, inputs, mx.bfloat16, epilogue, only(way, most))
            yield f"{way.groups},{way.stages},{way.splits}{'*' * (way == usual)}", product


def fixed(way: Way) -> product_kernel.Choose:
    return lambda *_: way


def only(way: WideWay, most: int) -> wide_product_kernel.Choose:
    """This way for so many tokens, the usual one for others."""
    usual = wide_product_kernel.way
    return lambda outputs, inputs, tokens, kind: way if tokens == most else usual(outputs, inputs, tokens, kind)


def numbers(name: str) -> list[int]:
    return [*map(int, name.split(","))]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--ways", nargs="+", default=[])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=None)
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    kernel_cache.settle()
    budget = Budget(arguments.seconds)
    best: list[str] = []
    mx.eval(waiting())
    print(f"{'shape':>12} {'rows':>4} {'way':<16} {'gpu':>7} {'GB/s':>6} {'host':>6} {'error':>7}")
    for shape in arguments.shapes:
        outputs, inputs = map(int, shape.split("x"))
        size = outputs * inputs * 2
        weights = [
            (mx.random.normal((outputs, inputs)) * inputs**-0.5).astype(mx.bfloat16) for _ in range(-(-CACHE // size))
        ]
        mx.eval(weights)
        for rows in arguments.rows:
            x = mx.random.normal((rows, inputs)).astype(mx.bfloat16)
            found: dict[str, Figures] = {}
            # All are compiled side by side.
            for name, width, product, gated in [*candidates(outputs, inputs, rows, arguments.ways)]:
                if budget.over:
                    progress("out of time")
                    break
                try:
                    wrong = error(product, x, weights[0], gated)
                    figures = found[name] = measure(product, x, weights, width, arguments.repeat)
                except RuntimeError as failure:  # does not compile, or is not to be had on this device
                    print(f"{shape:>12} {rows:>4} {name:<16} {failure}", flush=True)
                    continue
                note = "" if figures.ahead else "  (the host is the limit)"
                print(
                    f"{shape:>12} {rows:>4} {name:<16} {figures.gpu:>7.2f} {size / figures.gpu / 1e3:>6.0f}"
                    f" {figures.host:>6.2f} {wrong:>7.4f}{note}",
                    flush=True,
                )
            for kind in ("", "swiglu "):
                ways = {name: figures.gpu for name, figures in found.items() if name[len(kind) :][:1].isdigit()}
                ways = {name: gpu for name, gpu in ways.items() if name.startswith(kind)}
                if ways:
                    fastest = min(ways, key=ways.__getitem__)
                    other = found["swiglu apart" if kind else "x @ w.T"].gpu
                    best.append(f"{shape:>12} {rows:>4} {fastest:<16} {ways[fastest]:>7.2f} against {other:>7.2f}")
        del weights
    progress("best of each:")
    print("\n".join(best))


if __name__ == "__main__":
    main()
