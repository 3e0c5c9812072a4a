"""What rows' adapters cost a product of 33 to 128 tokens on a Hopper GPU, by shape (wide_changed_kernel.py).

    python tests/bench/wide_changes.py [--rows 40 64 128] [--only qkv output …] [--adapters 9] [--rank 8] [--pieces 4 8]

Microseconds of the device a launch: the product alone, with each row's change in the same launch, for each number of
pieces that share K for inner products, with fewer blocks for the weight, and in a launch more. The engine takes few
pieces where all blocks run at once then, or fewer blocks where these do, and else many pieces (`at once`, `by fewer`,
`in turns`, in a line before). Rows have the adapters and none in turn. As in tests/bench/product_kernel.py, launches
wait for each other, and no cache holds what they read; that they do is free here, since each one's tokens are outputs
of the one before, or these are what is added. `apart` is how far both ways' results are from each other, of their norm.
The shapes are those of Llama-3.2-1B's joined layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
from msgspec.structs import replace

from runner.engine import kernel_cache, wide_changed_kernel, wide_changes, wide_product_kernel
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed
from tests.bench.product_kernel import CACHE, CHAIN, WAIT, timed, waiting
from tests.engine.adapters.stacks import stacked


@dataclass(frozen=True, slots=True)
class Layer:
    """A joined layer: where its parts are, and whether something is added to its outputs."""

    parts: tuple[int, ...]
    inputs: int
    epilogue: str = "plain"
    added: bool = False

    @property
    def outputs(self) -> int:
        return sum(self.parts) // parts(self.epilogue)


LAYERS = {
    "qkv": Layer((2048, 512, 512), 2048),
    "output": Layer((2048,), 2048, added=True),
    "gate": Layer((8192, 8192), 2048, "swiglu"),
    "down": Layer((2048,), 8192, added=True),
}

Launch = Callable[[mx.array, mx.array | None, int], mx.array]
"""From tokens, what is added, and which of the weights."""


class Given:
    """What the launches of one layer read."""

    def __init__(self, layer: Layer, adapters: int, rank: int) -> None:
        outputs, inputs = sum(layer.parts), layer.inputs
        self.count = -(-CACHE // (outputs * inputs * 2))
        self.weights = [
            (mx.random.normal((outputs, inputs)) * inputs**-0.5).astype(mx.bfloat16) for _ in range(self.count)
        ]
        one = stacked(inputs, [[(part, rank) for part in layer.parts]] * adapters, mx.bfloat16)
        # Each has to be memory of its own.
        self.stacks = [Stack.of(one.down, one.b, None, one.spans) for _ in range(self.count)]
        mx.eval(self.weights, [stack.arrays for stack in self.stacks])

    def alone(self, layer: Layer) -> Launch:
        multiply = wide_product_kernel.multiply(layer.outputs, layer.inputs, mx.bfloat16, layer.epilogue)
        return lambda x, added, i: multiply(x, self.weights[i], added)

    def changed(self, changed: Changed, slots: RowSlots) -> Launch:
        return lambda x, added, i: changed(x, self.weights[i], added, self.stacks[i], slots)


def made(layer: Layer, pieces: list[int]) -> dict[str, Changed]:
    """The ways to have changes, by name. They begin to be compiled."""
    what = layer.outputs, layer.inputs, mx.bfloat16, layer.epilogue
    chosen = (wide_changed_kernel.way, wide_changed_kernel.shorter)
    usual = {choose(layer.outputs, layer.inputs, 128, layer.epilogue).pieces for choose in chosen}
    ways = {
        f"one launch, {count}": wide_changed_kernel.changed(*what, choose=in_pieces(count))
        for count in pieces or sorted(usual)
    }
    return ways | {
        "by fewer": wide_changed_kernel.changed(*what, wide_changed_kernel.yielding),
        "two launches": wide_changes.changed(*what),
    }


def in_pieces(count: int) -> wide_product_kernel.Choose:
    def choose(outputs: int, inputs: int, tokens: int, epilogue: str) -> wide_product_kernel.Way:
        return replace(wide_changed_kernel.way(outputs, inputs, tokens, epilogue), pieces=count)

    return choose


def chain(launch: Launch, layer: Layer, x: mx.array, added: mx.array | None, count: int) -> mx.array:
    y = launch(x, added, 0)
    for i in range(1, CHAIN):
        if layer.outputs < layer.inputs:
            added = y
        else:
            x = y.reshape(-1)[: x.size].reshape(x.shape)
        y = launch(x, added, i % count)
    return y


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[40, 64, 128])
    parser.add_argument("--only", nargs="+", choices=[*LAYERS], default=[*LAYERS])
    parser.add_argument("--adapters", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pieces", type=int, nargs="+", default=[])
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if not wide_product_kernel.usable():
        raise SystemExit("needs a Hopper GPU")
    kernel_cache.settle()
    ways = {name: made(LAYERS[name], arguments.pieces) for name in arguments.only}
    mx.eval(waiting())
    print(f"{'layer':>7} {'rows':>4} {'way':<16} {'gpu':>7} {'more':>6} {'host':>6} {'apart':>8}")
    for name in arguments.only:
        measure(name, ways[name], arguments)


def measure(name: str, ways: dict[str, Changed], arguments: argparse.Namespace) -> None:
    """Print a layer's figures."""
    layer, given = LAYERS[name], Given(LAYERS[name], arguments.adapters, arguments.rank)
    what = layer.outputs, layer.inputs, mx.bfloat16, layer.epilogue, given.stacks[0]
    kinds = zip(("at once", "by fewer", "in turns"), wide_changed_kernel.WAYS, strict=True)
    print(f"{name:>7} {next(kind for kind, (_, fits) in kinds if fits(*what))}", flush=True)
    for rows in arguments.rows:
        x = mx.random.normal((rows, 1, layer.inputs)).astype(mx.bfloat16)
        added = mx.random.normal((rows, 1, layer.outputs)).astype(mx.bfloat16) if layer.added else None
        slots = RowSlots.of([row % (arguments.adapters + 1) for row in range(rows)])
        launches = {"alone": given.alone(layer)}
        launches |= {way: given.changed(changed, slots) for way, changed in ways.items()}
        right = launches["two launches"](x, added, 0).astype(mx.float32)
        base = 0.0
        for way, launch in launches.items():
            off = mx.linalg.norm(launch(x, added, 0).astype(mx.float32) - right) / mx.linalg.norm(right)
            device, host = timed(partial(chain, launch, layer, x, added, given.count), arguments.repeat)
            gpu, each = device / CHAIN, host / CHAIN
            base = base or gpu
            note = "" if host < WAIT / 1000 else "  (the host is the limit)"
            changed = f"{gpu - base:>6.2f} {each:>6.2f} {off.item():>8.5f}" if way != "alone" else f"{each:>13.2f}"
            print(f"{name:>7} {rows:>4} {way:<16} {gpu:>7.2f} {changed}{note}", flush=True)


if __name__ == "__main__":
    main()
