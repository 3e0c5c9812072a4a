"""The launch that packs, writes and attends to packed keys, part by part against numpy, and what it takes.

    python tests/bench/packed_launch.py [--bits 8 4] [--context 16000] [--rows 1 8] [--heads 32 8 64] [--repeat 5]

First what is right: the codes, scales and biases that it writes for new tokens, against `mx.quantize` of the same keys
(rotated in float64) and values; and what is attended to, against float64 on what the planes say then. Each for one and
five tokens a row, with starts in the hundreds and at the context, and with keys shared by one block and by many.
`codes` is the share of codes that are others, and by how much at most; `scales`, `biases` and `attended` are the mean
and the largest error, relative to the mean size of what is right.

Then `gpu`: microseconds of the device a launch, in a chain of 50 over so many layers that no cache holds them, while
the device waits until the host has started all; `attention_kernel`'s in bfloat16 beside it. Medians.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
import numpy as np

from runner.engine.kv import attention_kernel, quantised_kernel
from runner.engine.kv.attention_kernel import Call
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall, PackedLaunch
from runner.engine.kv.rotary import Rotation
from tests.bench.product_kernel import timed, waiting
from tests.bench.record import progress

CHAIN = 50
CACHE = 250_000_000
"""Bytes of planes that no cache holds."""

Numbers = np.ndarray[Any, Any]
Heads = tuple[int, int, int]
"""Query heads, key heads, width."""


def turning(width: int) -> Rotation:
    """As a llama's, of a whole line."""
    return Rotation(width, False, mx.array([500000.0 ** (-2 * i / width) for i in range(width // 2)]), lambda x, _: x)


def planes_of(how: Quantisation, slots: int, heads: Heads, places: int, dtype: mx.Dtype) -> list[mx.array]:
    _, groups, width = heads
    arrays = [mx.random.normal((slots, groups, places, width)).astype(dtype) for _ in range(2)]
    planes = [part for array in arrays for part in how.pack(array)]
    mx.eval(planes)
    return planes


def drawn(rows: int, tokens: int, heads: Heads, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values as one product of all projections leaves them: not contiguous."""
    queries, groups, width = heads
    made = mx.random.normal((rows, tokens, queries + 2 * groups, width)).astype(dtype).swapaxes(1, 2)
    mx.eval(made)
    return made[:, :queries], made[:, queries : queries + groups], made[:, queries + groups :]


# --------------------------------------------------------------- what is right


def exact(array: mx.array) -> Numbers:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def turned(lines: mx.array, starts: Sequence[int], rotation: Rotation | None) -> mx.array:
    """[rows, heads, tokens, width] rotated in float64, in the type of the lines."""
    if rotation is None:
        return lines
    x, half = exact(lines), rotation.dims // 2
    at = np.array(starts)[:, None] + np.arange(lines.shape[2])
    angles = (at[..., None] * exact(rotation.frequencies))[:, None]
    first, second = x[..., :half], x[..., half : 2 * half]
    both = [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)]
    return mx.array(np.concatenate([*both, x[..., 2 * half :]], axis=-1).astype(np.float32)).astype(lines.dtype)


def codes(packed: mx.array, bits: int) -> Numbers:
    words = np.array(packed)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).reshape(*words.shape[:-1], -1).astype(np.int64)


def unpacked(packed: Sequence[mx.array], how: Quantisation) -> Numbers:
    scales, biases = (np.repeat(exact(array), how.group_size, axis=-1) for array in packed[1:])
    return codes(packed[0], how.bits) * scales + biases


def some(groups: int) -> list[int]:
    """Key heads that are looked at: numpy takes longer than all else."""
    return [0, groups - 1]


def attended(call: PackedCall, queries: mx.array, starts: Sequence[int], how: Quantisation) -> Numbers:
    """[rows, some key heads, query heads of each · tokens, width], of what the planes say."""
    tokens, width = queries.shape[2:]
    groups = call.keys.shape[1]
    answers = []
    for row, start in enumerate(starts):
        keys, values = (
            unpacked([plane[row, mx.array(some(groups)), : start + tokens] for plane in call.planes[part]], how)
            for part in (slice(3), slice(3, 6))
        )
        asked = exact(queries[row]).reshape(groups, -1, width)[some(groups)]
        scores = (call.scale * asked @ keys.swapaxes(1, 2)).reshape(-1, tokens, start + tokens)
        scores[:, np.arange(start + tokens) > start + np.arange(tokens)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        answers.append(weights.reshape(*asked.shape[:2], -1) @ values)
    return np.stack(answers)


def off(found: Numbers, right: Numbers) -> str:
    size = np.abs(right).mean() or 1.0
    apart = np.abs(found - right) / size
    return f"{apart.mean():.5f} {apart.max():.4f}"


@dataclass(frozen=True, slots=True)
class Written:
    """Places of new tokens in a plane."""

    starts: Sequence[int]
    tokens: int

    def __call__(self, plane: mx.array) -> mx.array:
        return mx.stack([plane[row, :, start : start + self.tokens] for row, start in enumerate(self.starts)])


def compare(launch: PackedLaunch, call: PackedCall, starts: Sequence[int], how: Quantisation) -> Iterator[str]:
    """A line a part."""
    out, planes = launch(call)
    mx.eval(out, planes)
    mx.synchronize()
    call = replace(call, planes=planes)
    written = Written(starts, call.keys.shape[2])
    for name, lines, part in (
        ("keys", turned(call.keys, starts, call.rotation), slice(3)),
        ("values", call.values, slice(3, 6)),
    ):
        right, found = how.pack(mx.contiguous(lines)), [written(plane) for plane in planes[part]]
        apart = np.abs(codes(found[0], how.bits) - codes(right[0], how.bits))
        yield f"{name}: codes {(apart > 0).mean():.4f} {apart.max()}"
        yield f"scales {off(exact(found[1]), exact(right[1]))}, biases {off(exact(found[2]), exact(right[2]))}"
    queries = turned(call.queries, starts, call.rotation)
    rows, _, _, width = out.shape
    groups = call.keys.shape[1]
    answers = exact(out).reshape(rows, groups, -1, width)[:, some(groups)]
    yield f"attended {off(answers, attended(call, queries, starts, how))}"


def check(launch: PackedLaunch, how: Quantisation, heads: Heads, context: int, dtype: mx.Dtype) -> None:
    """Two rows, one of hundreds of tokens and one of the context."""
    places, starts = -(-(context + 8) // 256) * 256, [300, context]
    planes = planes_of(how, len(starts), heads, places, dtype)
    own = quantised_kernel.splits
    for rotation, tokens in itertools.product((None, turning(heads[2])), (1, 5)):
        for shares in (1, own(len(starts) * heads[1] * tokens, places), 32):
            quantised_kernel.splits = lambda *_, shares=shares: shares
            queries, keys, values = drawn(len(starts), tokens, heads, dtype)
            at = mx.array(starts, dtype=mx.int32)
            scale = heads[2] ** -0.5
            call = PackedCall(
                *(queries, keys, values, planes, at, scale, None, how.bits, how.group_size, None, rotation)
            )
            found = "; ".join(compare(launch, call, starts, how))
            turns = "rotated" if rotation else "as is"
            progress(f"{how.bits} bits, {turns}, {tokens} tokens, {shares} blocks a row: {found}")
    quantised_kernel.splits = own


# --------------------------------------------------------------- what it takes


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


def time_all(heads: Heads, rows: int, context: int, bits: Sequence[int], repeat: int) -> None:
    ways = {"bfloat16": plain_chain(heads, rows, context)}
    ways |= {f"{n} bits": packed_chain(Quantisation(n, 64), heads, rows, context) for n in bits}
    for name, (build, size) in ways.items():
        gpu, host = timed(build, repeat)
        each = gpu / CHAIN
        rate = f"gpu {each:.2f} µs, {size / each / 1e3:.0f} GB/s; host {host / CHAIN:.2f} µs"
        progress(f"{rows} rows of {context}, {name}: {rate}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--context", type=int, default=16000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "WIDTH"))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    mx.random.seed(1)
    mx.eval(waiting())
    heads: Heads = tuple(arguments.heads)
    progress("compiled what waits")
    for bits in arguments.bits:
        check(quantised_kernel.attend_and_write, Quantisation(bits, 64), heads, arguments.context, mx.bfloat16)
    for rows in arguments.rows:
        time_all(heads, rows, arguments.context, arguments.bits, arguments.repeat)


if __name__ == "__main__":
    main()
