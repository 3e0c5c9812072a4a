"""What the time of blocks goes to in a product with each row's change (wide_changed_source.py), on a Hopper GPU.

    python tests/bench/wide_phases.py [--rows 8] [--only qkv output …] [--adapters 9] [--rank 16]

The kernels' sources, with the clock read between their parts by the first thread that multiplies, and by the first at
the side. Launches are of weights that no cache holds, one after the other; the last counts. Of the launch: nanoseconds
from the first block's beginning to the last's end, by the device's timer. Of blocks: cycles since their own beginning,
least, median and most of those that come so far: some end before.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
import numpy as np

from runner.engine import kernel_cache, wide_changed_kernel, wide_product_kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.cuda_kernels import Kernel
from runner.engine.product_kernel import no_sum
from runner.engine.wide_product_kernel import GROUP_THREADS, TOKENS, Choose
from tests.bench.wide_changes import LAYERS, Given, Layer

FIELDS: Final = 24
"""Numbers of a block: the timer at its beginning and its end, the clock at its beginning, and where it is read."""

_READ: Final = """
auto stamp = [&](int i) { times[blockIdx.x * 24 + i] = clock64(); };
auto timer = [&](int i) {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    times[blockIdx.x * 24 + i] = now;
};
if (threadIdx.x == 0) {
    times[blockIdx.x * 24 + 1] = 0;
    for (int i = 3; i < 24; ++i) times[blockIdx.x * 24 + i] = 0;
    timer(0);
    stamp(2);
}
__syncthreads();
"""
_FIRST: Final = "if (threadIdx.x == 0) "
_SIDE: Final = "if (threadIdx.x == THREADS) "

Mark = tuple[str, str, bool, str]
"""A name, a line of the source, whether the clock is read after it, and by whom."""

MARKS: Final[tuple[Mark, ...]] = (
    ("inner: counted", "if (threadIdx.x == 0) atomicAdd(const_cast<int*>(board), 1);", True, _FIRST),
    ("side: spans are known", "const int wide = widest, deep = wide * 4, lines", False, _SIDE),
    ("side: up is on its way", "while (acquire(board) < before) {}", False, ""),
    ("side: inner blocks are done", "atomicInc(reinterpret_cast<unsigned*>(const_cast", False, ""),
    ("side: has all", "} else {\nconst int line", False, _SIDE),
    ("multiplied", "arrive(CHUNKS_ARE_DONE, THREADS + SIDE);\nmeet(MULTIPLYING", False, _FIRST),
    ("sums are kept", "float* const group = partial", False, _FIRST),
    ("counted", "uint4* const residual =", False, _FIRST),
    ("gathered", "wait_for_groups<0>();\n}\n__syncthreads();", False, _FIRST),
    ("both are there", "constexpr int e = 0, AT_ONCE = 1, SOME", False, _FIRST),
)


def stamped(text: str) -> str:
    """The source, with the clock read at MARKS, and once more at the end."""
    for i, (_, line, after, who) in enumerate(MARKS):
        stamp = f"{who}stamp({i + 3});"
        assert text.count(line) <= 1, line
        text = text.replace(line, f"{line}\n{stamp}" if after else f"{stamp}\n{line}")
    last = f"if (threadIdx.x == 0) {{ stamp({len(MARKS) + 3}); timer(1); }}\n"
    begin = "int rows = 1;"
    assert begin in text
    return text.replace(begin, f"{_READ}{begin}", 1) + f"\n__syncthreads();\n{last}"


def taken(name: str, layer: Layer, rows: int, given: Given, choose: Choose, slots: RowSlots) -> np.ndarray[Any, Any]:
    """Numbers of each block of a launch, [blocks, FIELDS]."""
    tokens = next(most for most in TOKENS if rows <= most)
    outputs, inputs, epilogue = layer.outputs, layer.inputs, layer.epilogue
    way, dtype = choose(outputs, inputs, tokens, epilogue), mx.bfloat16
    _, kernel, width, between = wide_changed_kernel._prepare(outputs, way, tokens, dtype, epilogue)
    kernel = Kernel(
        name=f"phases_{name}_{way.splits}_{way.pieces}_{tokens}",
        inputs=wide_changed_kernel.inputs_of(way, tokens, epilogue, dtype),
        outputs=wide_changed_kernel.outputs_of(tokens, dtype, epilogue) | {"times": mx.int64},
        source=stamped(wide_changed_kernel.source(way, tokens, epilogue)),
        header=wide_changed_kernel.header(way, tokens, dtype, epilogue),
        shared_memory=way.shared_memory(tokens) + wide_changed_kernel.beside(way, tokens),
    )
    count, ranks, _ = given.stacks[0].down.shape
    blocks = width + wide_changed_kernel.inner_blocks(way, count, ranks)
    threads = way.groups * GROUP_THREADS + wide_changed_kernel.SIDE
    x = mx.random.normal((rows, 1, inputs)).astype(dtype)
    added = [mx.random.normal((rows, 1, outputs)).astype(dtype)] if layer.added else no_sum(dtype, epilogue)
    times = mx.zeros((1,))
    for i in range(2 * given.count):
        weight, stack = given.weights[i % given.count], given.stacks[i % given.count]
        arrays, results = between(rows, way.pieces * count * ranks)
        *_, times = kernel.launch(
            inputs=[x, weight, *added, stack.packed, slots.board(), *arrays],
            grid=(blocks * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(rows, 1, outputs), *results, (blocks, FIELDS)],
            output_dtypes=[dtype, *[mx.float32 for _ in results], mx.int64],
        )
        mx.eval(times)
    return np.array(times)


def show(times: np.ndarray[Any, Any]) -> None:
    """One launch."""
    began, ended = times[:, 0], times[:, 1]
    late = began - began.min()
    print(
        f"  {len(times)} blocks, {ended.max() - began.min()} ns; blocks begin after {np.median(late):.0f}, {late.max()}"
    )
    for i, name in enumerate([*(mark[0] for mark in MARKS), "end"]):
        there = times[times[:, i + 3] > 0]
        if len(there):
            cycles = there[:, i + 3] - there[:, 2]
            print(f"  {name:<28} {cycles.min():>7} {np.median(cycles):>7.0f} {cycles.max():>7}  of {len(there)}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--only", nargs="+", choices=[*LAYERS], default=[*LAYERS])
    parser.add_argument("--adapters", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    if not wide_product_kernel.usable():
        raise SystemExit("needs a Hopper GPU")
    kernel_cache.settle()
    for name in arguments.only:
        layer, given = LAYERS[name], Given(LAYERS[name], arguments.adapters, arguments.rank)
        what = layer.outputs, layer.inputs, mx.bfloat16, layer.epilogue, given.stacks[0]
        choose = next(choose for choose, fits in wide_changed_kernel.WAYS if fits(*what))
        for rows in arguments.rows:
            slots = RowSlots.of([row % (arguments.adapters + 1) for row in range(rows)])
            print(f"{name}, {rows} rows, {choose(layer.outputs, layer.inputs, rows, layer.epilogue)}", flush=True)
            show(taken(name, layer, rows, given, choose, slots))


if __name__ == "__main__":
    main()
