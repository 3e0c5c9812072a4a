"""A span of a row's positions, of many planes at once: one launch on CUDA for a copy a plane.

What is kept of a row is a span of the keys and values of every layer. Copied plane by plane that is two operations for
each, a slice and a copy, and the host takes longer to start them than the device to copy. Here planes of one shape and
type go into one array, by one launch where there is a device for it.

The launch only reads the planes, and MLX knows that it does. What launches of `attention_kernel` have written there has
to be dispatched before (`Planes.arrays`), as for any other reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel
from runner.engine.kv.attention_kernel import SWITCH

MOST: Final = 40
"""Planes of a launch: a kernel has 4 KiB of parameters for certain, and a plane's address and strides are 88 bytes."""

THREADS: Final = 256
_VECTOR: Final = 16
"""Bytes of a load."""

_EACH: Final = 4
"""Loads of a thread, which are under way together."""

SOURCE: Final = """
    constexpr int VECTOR = 16 / sizeof(T), SHARE = THREADS * EACH * VECTOR;
    const int heads = plane0_shape[1], width = plane0_shape[3], tokens = span[2];
    const int values = heads * tokens * width, blocks = (values + SHARE - 1) / SHARE;
    const int plane = blockIdx.x / blocks;
    const T* from = nullptr;
    long by_row = 0, by_head = 0, by_token = 0, by_value = 0;
    switch (plane) { PLANES }
    from += span[0] * by_row + span[1] * by_token;
    T* const to = out + long(plane) * values;
    const int first = blockIdx.x % blocks * SHARE + threadIdx.x * VECTOR;
    auto at = [&](int i) {
        const int line = i / width, head = line / tokens;
        return head * by_head + (line - head * tokens) * by_token + (i - line * width) * by_value;
    };
    const long lines = (by_head | by_token | width) * long(sizeof(T));
    if (by_value == 1 && (size_t(from) | size_t(to) | lines) % 16 == 0) {
        uint4 passing[EACH];
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            if (i < values) passing[e] = *reinterpret_cast<const uint4*>(from + at(i));
        }
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            if (i < values) *reinterpret_cast<uint4*>(to + i) = passing[e];
        }
    } else {
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            for (int v = i; v < i + VECTOR && v < values; ++v) to[v] = from[at(v)];
        }
    }
"""
"""A block takes a share of one plane's values. T, THREADS and EACH are constants, PLANES is `cases`; `span` says row,
first position, and how many."""


def copy(planes: Sequence[mx.array], row: int, start: int, stop: int) -> mx.array:
    """[planes, heads, stop - start, width]: positions `start` to `stop` - 1 of a row, of planes [slots, heads,
    capacity, width] of one shape and type; MOST of them at most. Not computed yet."""
    if not applies(planes):
        return separately(planes, row, start, stop)
    dtype = planes[0].dtype
    _, heads, _, width = planes[0].shape
    tokens = stop - start
    copied: mx.array = _kernel(len(planes), dtype).launch(
        inputs=[*planes, mx.array([row, start, tokens], dtype=mx.int32)],
        grid=(len(planes) * blocks(heads * tokens * width, dtype) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(len(planes), heads, tokens, width)],
        output_dtypes=[dtype],
    )[0]
    return copied


def applies(planes: Sequence[mx.array]) -> bool:
    """Whether a launch can do it: there is a device for it, the switch is not off, and they hold something."""
    return cuda_kernels.usable(SWITCH) and planes[0].size > 0


def separately(planes: Sequence[mx.array], row: int, start: int, stop: int) -> mx.array:
    """The same by MLX's operations: a slice of each plane."""
    parts = [plane[row : row + 1, :, start:stop] for plane in planes]
    # MLX joins one array to itself.
    return mx.concatenate(parts) if len(parts) > 1 else mx.contiguous(parts[0])


def blocks(values: int, dtype: mx.Dtype) -> int:
    """How many copy so many values of a plane."""
    return -(-values * dtype.size // (THREADS * _EACH * _VECTOR))


def source(planes: int) -> str:
    """The kernel's, for so many planes."""
    cases = (
        f"case {i}: from = plane{i}; by_row = plane{i}_strides[0]; by_head = plane{i}_strides[1]; "
        f"by_token = plane{i}_strides[2]; by_value = plane{i}_strides[3]; break;"
        for i in range(planes)
    )
    return cuda_kernels.terse(SOURCE.replace("PLANES", "\n".join(cases)))


def constants() -> dict[str, int]:
    """What it does not say, but for T."""
    return {"THREADS": THREADS, "EACH": _EACH}


@cache
def _kernel(planes: int, dtype: mx.Dtype) -> Kernel:
    return Kernel(
        name=f"copy_{planes}_planes",
        inputs={**{f"plane{i}": dtype for i in range(planes)}, "span": mx.int32},
        outputs={"out": dtype},
        source=source(planes),
        # A copy of the planes is what has to be avoided.
        ensure_row_contiguous=False,
        template=[("T", dtype), *constants().items()],
    )
