"""What the launch that attends to packed keys makes, part by part against numpy, for `packed_launch.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from msgspec.structs import replace

from runner.engine.kv import quantised_kernel
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall, PackedLaunch
from runner.engine.kv.rotary import Rotation
from tests.bench.record import progress

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
        for shares in (1, 8, 64):
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
