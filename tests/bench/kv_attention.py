"""Ways to attend to cached keys with one new token a row, timed by themselves, to choose among in runner/engine/kv.

    python tests/bench/kv_attention.py [--rows 1 8 32 128] [--context 300 2000 16000]

Rows have different lengths, so all but "no mask" take one. Microseconds a layer: the least of rounds of many layers
in one graph. "new length" is the first call at a length that was not seen before, which shows what is compiled for it.
"in parts" multiplies the packed values in as many products as give a GPU's processors something to do each: CUDA has no
kernel for values that are not transposed but one that takes a block of threads a row and key head for all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx

from runner.engine.kv.grouped import grouped
from runner.engine.kv.masks import masked
from runner.engine.kv.quantised import Quantisation, attend
from tests.bench.geometry import on_gpu
from tests.bench.record import Budget, Record, add_options, progress

LAYERS = 16
PART = 1024
"""Tokens of a product "in parts"."""
Way = Callable[[mx.array], mx.array]


class Case:
    """Keys and values of `rows` rows, at most `context` tokens each, in every way that they can be kept."""

    def __init__(self, rows: int, context: int, heads: int, groups: int, width: int) -> None:
        self.dtype = mx.bfloat16 if on_gpu() else mx.float32
        self.capacity = -(-context // 256) * 256
        shape = (rows, groups, self.capacity, width)
        self.keys, self.values = (mx.random.normal(shape).astype(self.dtype) for _ in range(2))
        self.queries = mx.random.normal((rows, heads, 1, width)).astype(self.dtype)
        self.scale = width**-0.5
        self.lengths = mx.array([context - row % 7 for row in range(rows)])[:, None, None, None]
        self.packed = {bits: [Quantisation(bits, 64).pack(a) for a in (self.keys, self.values)] for bits in (8, 4)}
        mx.eval(self.keys, self.values, self.queries, self.lengths, self.packed)

    def ways(self, context: int) -> dict[str, Way]:
        """By name; each maps queries to what is attended."""
        seen = mx.arange(self.capacity) < self.lengths
        added = mx.where(seen, 0, -float("inf")).astype(self.dtype)
        mx.eval(seen, added)
        keys, values = self.keys[:, :, :context], self.values[:, :, :context]
        here, rows, groups = seen[..., :context], self.queries.shape[0], self.keys.shape[1]
        fast = mx.fast.scaled_dot_product_attention
        joined = (rows, groups, -1, self.queries.shape[3])
        ways: dict[str, Way] = {
            "fast, no mask": lambda q: fast(q, keys, values, scale=self.scale),
            "fast": lambda q: fast(q, keys, values, scale=self.scale, mask=here),
            "grouped": lambda q: grouped(q, keys, values, self.scale, here),
            "grouped, all room": lambda q: grouped(q, self.keys, self.values, self.scale, seen),
            "fast on groups, all room": lambda q: fast(
                q.reshape(joined), self.keys, self.values, scale=self.scale, mask=added
            ).reshape(q.shape),
        }
        for bits, (packed_keys, packed_values) in self.packed.items():
            how = Quantisation(bits, 64)
            ways[f"{bits} bits"] = self._packed(how, packed_keys, packed_values, seen)
            if self.capacity % PART == 0:
                ways[f"{bits} bits, in parts"] = self._in_parts(how, packed_keys, packed_values, seen)
            ways[f"{bits} bits, unpacked"] = self._unpacked(how, packed_keys, packed_values, seen)
        return ways

    def _packed(self, how: Quantisation, keys: tuple, values: tuple, seen: mx.array) -> Way:  # type: ignore[type-arg]
        return lambda q: attend(q, keys, values, how, self.scale, seen, None)

    def _in_parts(self, how: Quantisation, keys: tuple, values: tuple, seen: mx.array) -> Way:  # type: ignore[type-arg]
        rows, groups, tokens = keys[0].shape[:3]
        parts = tuple(array.reshape(rows, groups, tokens // PART, PART, -1) for array in values)

        def attend_in_parts(queries: mx.array) -> mx.array:
            _, heads, count, width = queries.shape
            shared = heads // groups
            grouped = (queries * self.scale).reshape(rows, groups, shared * count, width)
            scores = masked(how.product(grouped, keys, True), seen, (rows, groups, shared, count))
            weights = mx.softmax(scores, axis=-1, precise=True)
            weights = weights.reshape(rows, groups, shared * count, -1, PART).swapaxes(2, 3)
            product = mx.quantized_matmul(weights, *parts, transpose=False, group_size=how.group_size, bits=how.bits)
            return product.sum(2).reshape(queries.shape)

        return attend_in_parts

    def _unpacked(self, how: Quantisation, keys: tuple, values: tuple, seen: mx.array) -> Way:  # type: ignore[type-arg]
        return lambda q: grouped(q, how.unpack(keys), how.unpack(values), self.scale, seen)


def seconds(way: Way, queries: mx.array) -> float:
    """Of one evaluation of LAYERS calls, each on the result of the one before."""
    began = time.perf_counter()
    for _ in range(LAYERS):
        queries = way(queries)
    mx.eval(queries)
    return time.perf_counter() - began


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128] if on_gpu() else [1, 4])
    parser.add_argument("--context", type=int, nargs="+", default=[300, 2000, 16000] if on_gpu() else [300, 1000])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "WIDTH"))
    parser.add_argument("--ways", nargs="+", help="only those (default: all)")
    add_options(parser)
    arguments = parser.parse_args()
    budget = Budget(arguments.budget)
    record = Record(arguments.record, "attention", f"µs a layer of attention, heads {arguments.heads}")
    progress(f"{mx.default_device()}")
    for context in arguments.context:
        for rows in arguments.rows:
            if rows * context > 1 << 20:
                continue
            case = Case(rows, context, *arguments.heads)
            for name in arguments.ways or case.ways(context):
                if budget.over:
                    record.left_out(f"{name}, {rows} rows of {context}")
                    continue
                try:
                    report(record, case, name, context)
                except (RuntimeError, ValueError) as error:
                    record.note(name, str(error))
                    progress(f"{name}: {error}")
    record.finish()


def report(record: Record, case: Case, name: str, context: int) -> None:
    """One row."""
    way = case.ways(context)[name]
    first = seconds(way, case.queries)
    least = min(seconds(way, case.queries) for _ in range(8))
    fresh = [seconds(case.ways(context - 8 - i)[name], case.queries) for i in range(3)]
    rows, figures = len(case.queries), [least / LAYERS * 1e6, min(fresh) / LAYERS * 1e6, first]
    cells = {"rows": str(rows), "tokens": str(context), "way": name}
    cells |= {"µs": f"{figures[0]:.1f}", "new length": f"{figures[1]:.1f}", "first call, s": f"{first:.2f}"}
    record.row(cells, {"rows": rows, "tokens": context, "way": name, "figures": figures})


if __name__ == "__main__":
    main()
