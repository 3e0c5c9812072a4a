"""Rows' positions, of many planes at once: one launch on CUDA for an operation or two a plane.

What is kept of a row, what rows bring that join, and what moves when others leave, is a span of the keys and values of
every layer. Copied plane by plane that is a slice and a copy, or a slice and a write, for each, and the host takes
longer to start them than the device to do them. Here planes of one shape and type go into one array (`copy`), by one
launch where there is a device for it, and from such an array into planes (`put`).

`copy` only reads the planes, and MLX knows that it does. `put` writes them in place, without MLX's knowing;
`attention_kernel` says why that is sound. It is simpler here: what was launched before is dispatched (`Planes.arrays`),
and this is started at once, so that all that comes later is in a later graph.
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

_MOST_VALUES: Final = 1 << 30
"""Of a plane, that are copied at once: they are counted in 32 bits."""

PLANE: Final = """
    constexpr int VECTOR = 16 / sizeof(T), SHARE = THREADS * EACH * VECTOR;
    const int heads = plane0_shape[1], width = plane0_shape[3];
    const int values = rows * heads * length * width, blocks = (values + SHARE - 1) / SHARE;
    const int which = blockIdx.x / blocks, first = blockIdx.x % blocks * SHARE + threadIdx.x * VECTOR;
    const T* plane = nullptr;
    long by_row = 0, by_head = 0, by_token = 0, by_value = 0;
    switch (which) { PLANES }
    const long lines = (by_row | by_head | by_token | width) * long(sizeof(T));
    const bool whole = by_value == 1 && (size_t(plane) | size_t(others) | lines) % 16 == 0;
"""
"""A block's share of one plane's values: `length` positions from `start` on of `rows` rows, `slots` of which are told.
T, THREADS and EACH are constants, PLANES is `cases`; `others` is where values come from or go to."""

COPY: Final = """
    const int rows = span_shape[0] - 2, start = span[0], length = span[1];
    const int* const slots = span + 2;
    T* const others = out;
    PLANE
    T* const to = out + long(which) * values;
    auto at = [&](int i) {
        const int line = i / width, of = line / length, row = of / heads;
        return slots[row] * by_row + (of - row * heads) * by_head + (start + line - of * length) * by_token
             + (i - line * width) * by_value;
    };
    if (whole) {
        uint4 passing[EACH];
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            if (i < values) passing[e] = *reinterpret_cast<const uint4*>(plane + at(i));
        }
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            if (i < values) *reinterpret_cast<uint4*>(to + i) = passing[e];
        }
    } else {
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            for (int v = i; v < i + VECTOR && v < values; ++v) to[v] = plane[at(v)];
        }
    }
"""

PUT: Final = """
    const int rows = span_shape[0] - 3, start = span[0], tokens = span[1], length = span[2] - start;
    const int* const slots = span + 3;
    const T* const others = stack;
    PLANE
    T* const written = const_cast<T*>(plane);
    const int lists = stack_shape[1], room = stack_shape[2];
    // Where a value goes, and where it comes from: nowhere, for zeros.
    auto at = [&](int i, const T*& from) {
        const int line = i / width, of = line / length, row = of / heads;
        const int t = line - of * length, head = of - row * heads, column = i - line * width;
        const long list = long(which) * lists + (lists == heads ? head : of);
        from = t < tokens ? stack + (list * room + t) * width + column : nullptr;
        return slots[row] * by_row + head * by_head + (start + t) * by_token + column * by_value;
    };
    if (whole) {
        uint4 passing[EACH];
        const T* from;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            passing[e] = uint4{0, 0, 0, 0};
            if (i < values && (at(i, from), from)) passing[e] = *reinterpret_cast<const uint4*>(from);
        }
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            if (i < values) *reinterpret_cast<uint4*>(written + at(i, from)) = passing[e];
        }
    } else {
        for (int e = 0; e < EACH; ++e) {
            const int i = first + e * THREADS * VECTOR;
            for (int v = i; v < i + VECTOR && v < values; ++v) {
                const T* from;
                const long into = at(v, from);
                written[into] = from ? *from : T(0.0f);
            }
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) done[0] = 0;
"""


def applies(planes: Sequence[mx.array]) -> bool:
    """Whether launches can do it: there is a device for them, the switch is not off, and the planes hold something,
    but not too much to be counted."""
    return cuda_kernels.usable(SWITCH) and 0 < planes[0].size <= planes[0].shape[0] * _MOST_VALUES


def copy(planes: Sequence[mx.array], rows: Sequence[int], start: int, stop: int) -> mx.array:
    """[planes, rows · heads, stop - start, width]: positions `start` to `stop` - 1 of rows, not computed yet.

    `planes` [slots, heads, capacity, width] are of one shape and type, MOST of them at most.
    """
    if not applies(planes):
        return separately(planes, rows, start, stop)
    dtype = planes[0].dtype
    _, heads, _, width = planes[0].shape
    lists, tokens = len(rows) * heads, stop - start
    copied: mx.array = _copy(len(planes), dtype).launch(
        inputs=[*planes, mx.array([start, tokens, *rows], dtype=mx.int32)],
        grid=(len(planes) * blocks(lists * tokens * width, dtype) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(len(planes), lists, tokens, width)],
        output_dtypes=[dtype],
    )[0]
    return copied


def put(
    planes: Sequence[mx.array], stack: mx.array, rows: Sequence[int], start: int, tokens: int, end: int
) -> mx.array:
    """Write what `copy` has made to the same positions of other planes, of rows as many as there, or of one to all.

    Of the stack `tokens` are put from `start` on, and zeros from there to `end` - 1. Returns what is to be started at
    once. Only where launches apply.
    """
    _, heads, _, width = planes[0].shape
    values = len(rows) * heads * (end - start) * width
    done: mx.array = _put(len(planes), stack.dtype).launch(
        inputs=[*planes, stack, mx.array([start, tokens, end, *rows], dtype=mx.int32)],
        grid=(len(planes) * blocks(values, stack.dtype) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )[0]
    return done


def separately(planes: Sequence[mx.array], rows: Sequence[int], start: int, stop: int) -> mx.array:
    """As `copy`, of a single row, by MLX's operations: a slice of each plane."""
    (row,) = rows
    parts = [plane[row : row + 1, :, start:stop] for plane in planes]
    # MLX joins one array to itself.
    return mx.concatenate(parts) if len(parts) > 1 else mx.contiguous(parts[0])


def rows_at_once(plane: mx.array) -> int:
    """How many whole rows of such a plane a launch can take."""
    return max(1, _MOST_VALUES * plane.shape[0] // plane.size)


def blocks(values: int, dtype: mx.Dtype) -> int:
    """How many copy so many values of a plane."""
    return -(-values * dtype.size // (THREADS * _EACH * _VECTOR))


def source(of: str, planes: int) -> str:
    """A kernel's, COPY or PUT, for so many planes."""
    cases = (
        f"case {i}: plane = plane{i}; by_row = plane{i}_strides[0]; by_head = plane{i}_strides[1]; "
        f"by_token = plane{i}_strides[2]; by_value = plane{i}_strides[3]; break;"
        for i in range(planes)
    )
    plane = PLANE.replace("PLANES", "\n".join(cases))
    return cuda_kernels.terse(of.replace("    PLANE\n", plane))


def constants() -> dict[str, int]:
    """What it does not say, but for T."""
    return {"THREADS": THREADS, "EACH": _EACH}


def inputs(of: str, planes: int, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What it calls a call's arrays, and their types."""
    stack = {"stack": dtype} if of == PUT else {}
    return {f"plane{i}": dtype for i in range(planes)} | stack | {"span": mx.int32}


@cache
def _copy(planes: int, dtype: mx.Dtype) -> Kernel:
    # What is kept will be put one day; and the first of both is a start's trial, for which nobody waits.
    _put(planes, dtype)
    return _kernel(f"copy_{planes}_planes", COPY, planes, dtype, {"out": dtype})


@cache
def _put(planes: int, dtype: mx.Dtype) -> Kernel:
    return _kernel(f"put_{planes}_planes", PUT, planes, dtype, {"done": mx.int32})


def _kernel(name: str, of: str, planes: int, dtype: mx.Dtype, outputs: dict[str, mx.Dtype]) -> Kernel:
    return Kernel(
        name=name,
        inputs=inputs(of, planes, dtype),
        outputs=outputs,
        source=source(of, planes),
        # A copy of the planes is what has to be avoided, or would be written in their place.
        ensure_row_contiguous=False,
        template=[("T", dtype), *constants().items()],
    )
