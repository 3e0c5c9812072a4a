"""Ways to have few tokens attend in one launch on CUDA, to choose among in runner/engine/kv/decode_kernel.py.

    python tests/bench/decode_attention.py [--heads 32 8 64] [--ways 4,2 8,2 …] [--seconds 50]

First what is right: the largest error against float32 on the host, relative to the spread of the result, for several
geometries, tokens, and blocks that share keys, where what lies behind a row's tokens are no numbers. Then microseconds
of the device a launch, in a chain over so many layers that no cache holds them, which starts when the host has handed
all of it over. A way is warps, stages and splits; `lanes` is the kernel for other widths and float32. Medians; what the
engine takes has a star.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
import msgspec
from msgspec.structs import replace

from runner.engine import kernel_cache
from runner.engine.kv import attention_kernel, decode_kernel
from runner.engine.kv.calls import Call
from runner.engine.kv.masks import FEW
from runner.engine.kv.rotary import Rotation
from tests.bench.product_kernel import timed, waiting
from tests.bench.record import Budget, progress
from tests.engine.kv.launches import separately

CHAIN = 48
CACHE = 250_000_000
"""Bytes of planes that no cache holds."""

WAYS = ("4,2", "4,3", "4,4", "2,3", "2,5", "8,1", "8,2", "8,3", "16,1", "16,2")
SPLITS = (1, 2, 4, 8, 16, 32)

Heads = tuple[int, int, int]
"""Query heads, key heads, width."""

SHAPE, SPLIT, CROWD = decode_kernel.shape, decode_kernel.splits, decode_kernel.CROWD


class Way(msgspec.Struct, frozen=True):
    """Warps and stages of a block, and how many share a row's keys; the engine's own where it says nothing."""

    warps: int | None = None
    stages: int | None = None
    splits: int | None = None
    lanes: bool = False

    def __str__(self) -> str:
        if self.lanes:
            return "lanes"
        return f"{self.warps},{self.stages},{self.splits}" if self.warps else "*"

    def take(self) -> None:
        """Have launches do it so."""

        def shape(*what: object) -> decode_kernel.Shape | None:
            own = None if self.lanes else SHAPE(*what)  # type: ignore[arg-type]
            if own is None or self.warps is None or self.stages is None:
                return own
            return replace(own, warps=self.warps, stages=self.stages)

        # Rows are shared by as many blocks as the way says, however many there are.
        crowd = CROWD if self.warps is None else 1 << 20
        if crowd != decode_kernel.CROWD:
            decode_kernel.CROWD = crowd  # type: ignore[misc]
            decode_kernel.kernel.cache_clear()
        decode_kernel.shape = shape  # type: ignore[assignment]
        decode_kernel.splits = SPLIT if self.splits is None else lambda *_: self.splits or 1


def turning(width: int) -> Rotation:
    """As a llama's, of a whole line."""
    return Rotation(width, False, mx.array([500000.0 ** (-2 * i / width) for i in range(width // 2)]), lambda x, _: x)


def call(heads: Heads, lengths: Sequence[int], tokens: int, dtype: mx.Dtype, planes: tuple[mx.array, ...]) -> Call:
    """Queries, keys and values are as one product of all projections leaves them: not contiguous."""
    queries, groups, width = heads
    made = mx.random.normal((len(lengths), tokens, queries + 2 * groups, width)).astype(dtype).swapaxes(1, 2)
    parts = made[:, :queries], made[:, queries : queries + groups], made[:, queries + groups :]
    starts = mx.array(lengths, dtype=mx.int32)
    rotation = turning(width)
    mx.eval(*parts, starts, rotation.frequencies)
    return Call(*parts, planes, starts, width**-0.5, None, None, None, rotation)  # type: ignore[arg-type]


# --------------------------------------------------------------- what is right


def error(heads: Heads, lengths: Sequence[int], tokens: int, dtype: mx.Dtype) -> float:
    places = -(-(max(lengths) + tokens) // 256) * 256
    behind = mx.arange(places)[None, None, :, None] >= mx.array(lengths)[:, None, None, None]
    shape = len(lengths), heads[1], places, heads[2]
    clean = [mx.where(behind, 0, mx.random.normal(shape)).astype(dtype) for _ in range(2)]
    poisoned = [mx.where(behind, float("nan"), plane).astype(dtype) for plane in clean]
    mx.eval(clean, poisoned)
    one = call(heads, lengths, tokens, dtype, tuple(poisoned))
    found, written = attention_kernel.attend_and_write(one)
    mx.eval(found, written)
    mx.synchronize()
    with mx.stream(mx.cpu):
        right, planes = separately(replace(one, planes=tuple(clean)))
        apart = [found.astype(mx.float32) - right.astype(mx.float32)]
        # What is behind the new tokens was no number, and still is.
        end = mx.array(lengths)[:, None, None, None] + tokens
        seen = mx.arange(places)[None, None, :, None] < end
        apart += [
            mx.where(seen, mine.astype(mx.float32) - its.astype(mx.float32), 0)
            for mine, its in zip(written, planes, strict=True)
        ]
        spread = mx.sqrt(mx.mean(right.astype(mx.float32) ** 2))
        largest = mx.stack([mx.max(mx.where(mx.isnan(x), float("inf"), mx.abs(x))) for x in apart])
        return float((mx.max(largest) / spread).item())


CHECKED: tuple[tuple[mx.Dtype, Heads], ...] = (
    (mx.bfloat16, (32, 8, 64)),
    (mx.float16, (32, 8, 64)),
    (mx.bfloat16, (32, 8, 128)),
    (mx.bfloat16, (8, 4, 256)),
)


def check(heads: Heads, ways: Sequence[Way]) -> None:
    """The engine's own way for several geometries, other ways for one of them."""
    for dtype, geometry in CHECKED:
        found = []
        for tokens, splits in [(1, 1), (1, None), (1, 4), (2, 2), (5, None)]:
            Way(splits=splits).take()
            found.append(f"{error(geometry, [0, 5, 300, 1000], tokens, dtype):.4f}")
        progress(f"{dtype} {geometry}: {' '.join(found)}")
    found = []
    for way in ways:
        way.take()
        found.append(f"{way} {max(error(heads, [3, 311, 3000], 1, mx.bfloat16) for _ in range(2)):.4f}")
    progress("; ".join(found))


# --------------------------------------------------------------- what it takes


def chain(heads: Heads, lengths: Sequence[int], tokens: int) -> tuple[Callable[[], mx.array], int]:
    """A chain of launches, and the bytes that each has to read."""
    places = -(-(max(lengths) + tokens) // 256) * 256
    size = sum(lengths) * heads[1] * heads[2] * 4
    shape = len(lengths), heads[1], places, heads[2]
    layers = min(CHAIN, max(1, -(-CACHE // max(1, size))))
    planes = [tuple(mx.random.normal(shape, mx.bfloat16) for _ in range(2)) for _ in range(layers)]
    mx.eval(planes)
    first = call(heads, lengths, tokens, mx.bfloat16, planes[0])

    def build() -> mx.array:
        after = None
        for i in range(CHAIN):
            after, _ = attention_kernel.attend_and_write(replace(first, planes=planes[i % layers], after=after))
        assert after is not None
        return after

    return build, size


def lengths_of(rows: int, mean: int) -> list[int]:
    """From half to one and a half times the mean."""
    return [mean // 2 + mean * (i * 37 % rows) // rows for i in range(rows)] if rows > 1 else [mean]


def cases() -> Iterator[tuple[str, list[int], int]]:
    for rows, mean in [(1, 1), (1, 300), (8, 300), (32, 300), (64, 300), (128, 300), (128, 1), (1, 2000), (1, 16384)]:
        yield f"{rows} of {mean}", lengths_of(rows, mean), 1
    yield "8 of 16384", lengths_of(8, 12000), 1
    yield "31 of 300, 1 of 16384", [300] * 31 + [16384], 1
    yield "1 of 300, 4 tokens", [300], 4
    yield "32 of 300, 4 tokens", lengths_of(32, 300), 4


def time_all(heads: Heads, ways: Sequence[Way], budget: Budget, repeat: int) -> None:
    for name, lengths, tokens in cases():
        if budget.over:
            progress("out of time")
            return
        build, size = chain(heads, lengths, tokens)
        crowd = len(lengths) * heads[1]
        found: dict[str, float] = {}
        held: set[str] = set()
        tried = [Way(), Way(lanes=True)]
        if tokens == 1:
            tried += [replace(way, splits=n) for way in ways for n in worth(crowd, max(lengths), way)]
        for way in tried:
            way.take()
            gpu, host = timed(build, repeat)
            found[str(way)] = gpu / CHAIN
            held |= {str(way)} if host >= 4000 else set()
        best = sorted(found, key=found.__getitem__)
        listed = "  ".join(f"{way}{' (host)' if way in held else ''} {found[way]:.2f}" for way in best)
        progress(f"{name} ({size / 4.6e6:.1f} µs at 4.6 TB/s; * {found['*']:.2f}): {listed}")


def worth(crowd: int, longest: int, way: Way) -> Iterator[int]:
    """Numbers of blocks a row that could be best: each warp has a tile or half of one, and few GPUs' worth."""
    warps = way.warps or 4
    for n in SPLITS:
        useful = n == 1 or (crowd * n * warps <= 8192 and longest >= warps * 8 * n)
        if useful and (longest < 8000 or crowd * n >= 128):
            yield n


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "WIDTH"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WARPS,STAGES")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=None)
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    kernel_cache.settle()
    budget = Budget(arguments.seconds)
    mx.random.seed(1)
    mx.eval(waiting())
    progress("compiled what waits")
    ways = [Way(*map(int, way.split(",")), splits=1) for way in arguments.ways]
    heads: Heads = tuple(arguments.heads)
    prepare(heads, ways)
    check(heads, ways)
    time_all(heads, ways, budget, arguments.repeat)


def prepare(heads: Heads, ways: Sequence[Way]) -> None:
    """Have all kernels compiled, side by side."""
    wanted = [(mx.bfloat16, heads, 1, way) for way in ways]
    wanted += [(dtype, geometry, tokens, Way()) for dtype, geometry in CHECKED for tokens in (1, 2, 5)]
    for dtype, (queries, groups, width), tokens, way in wanted:
        way.take()
        shape = decode_kernel.shape(dtype, width, queries, groups, tokens, FEW)
        if shape is not None:
            rotation = attention_kernel.rotating(turning(width))[1]
            decode_kernel.kernel(shape, 0, 0, rotation, width**-0.5, attention_kernel.types(dtype))


if __name__ == "__main__":
    main()
