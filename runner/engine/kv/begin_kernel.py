"""Planes of rows that begin with what was kept: made with it in them, by one launch on CUDA for all that are alike.

To make room is to fill it with zeros, an operation a plane, and to put a piece there is another launch for all planes
(`copy_kernel.put`). For a prompt of 4,096 tokens that is known the host took as long for that as for the decode step
that follows. Here the planes are what a launch returns, so there is nothing to clear before, and nothing is written
that MLX does not know of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel
from runner.engine.kv import copy_kernel

PIECES: Final = 16
"""Arrays that a launch takes: a kernel has that many parameters, however many pieces there are."""

BEGIN: Final = """
    const int row = span[0], rows = span[1], length = span[2];
    const int slots = span[3], heads = span[4], room = span[5], width = span[6];
    const int* const ends = span + 7;
    constexpr int VECTOR = 16 / sizeof(T), SHARE = THREADS * EACH * VECTOR;
    const int values = slots * heads * room * width, blocks = (values + SHARE - 1) / SHARE;
    const int which = blockIdx.x / blocks, first = blockIdx.x % blocks * SHARE + threadIdx.x * VECTOR;
    T* plane = nullptr;
    switch (which) { PLANES }
    // Where a value comes from: nowhere, for zeros.
    auto from = [&](int i) -> const T* {
        const int line = i / width, list = line / room, t = line - list * room;
        const int slot = list / heads, head = list - slot * heads;
        if (t >= length || slot < row || slot >= row + rows) return nullptr;
        int piece = 0;
        while (ends[piece] <= t) ++piece;
        const int start = piece > 0 ? ends[piece - 1] : 0;
        const T* stack = nullptr;
        switch (piece) { PIECES }
        const long lines = (long(which) * heads + head) * (ends[piece] - start);
        return stack + (lines + t - start) * width + (i - line * width);
    };
    const bool whole = width % VECTOR == 0;
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int i = first + e * THREADS * VECTOR;
        if (whole && i < values) {
            const T* const own = from(i);
            if (size_t(own) % 16 == 0 && size_t(plane + i) % 16 == 0) {
                *reinterpret_cast<uint4*>(plane + i) = own ? *reinterpret_cast<const uint4*>(own) : uint4{0, 0, 0, 0};
                continue;
            }
        }
        for (int v = i; v < i + VECTOR && v < values; ++v) {
            const T* const own = from(v);
            plane[v] = own ? *own : T(0.0f);
        }
    }
"""
"""A block's share of one plane. PLANES and PIECES are cases; THREADS and EACH are as `copy_kernel` has them."""


def applies(stacks: Sequence[mx.array], slots: int, room: int) -> bool:
    """Whether a launch can make planes of so many `slots`, with so much `room`, of what `copy` has made."""
    planes, heads, _, width = stacks[0].shape
    values = slots * heads * room * width
    return (
        planes <= copy_kernel.MOST
        and len(stacks) <= PIECES
        and 0 < values <= 1 << 30
        and copy_kernel.applies([stacks[0]])
    )


def begin(
    stacks: Sequence[mx.array], ends: Sequence[int], length: int, rows: range, slots: int, room: int
) -> list[mx.array]:
    """Planes [slots, heads, room, width], not computed yet: `rows` of them have the first `length` positions of the
    `stacks`, all other places are zeros.

    A stack [planes, heads, tokens, width] is what `copy` has made of one row, up to the position in `ends` at which the
    next one goes on. Only where it `applies`.
    """
    planes, heads, _, width = stacks[0].shape
    dtype = stacks[0].dtype
    more = PIECES - len(stacks)
    span = [rows.start, len(rows), length, slots, heads, room, width, *ends, *[ends[-1]] * more]
    made: list[mx.array] = _begin(planes, dtype).launch(
        inputs=[*stacks, *[stacks[-1]] * more, mx.array(span, dtype=mx.int32)],
        grid=(planes * copy_kernel.blocks(slots * heads * room * width, dtype) * copy_kernel.THREADS, 1, 1),
        threadgroup=(copy_kernel.THREADS, 1, 1),
        output_shapes=[(slots, heads, room, width)] * planes,
        output_dtypes=[dtype] * planes,
    )
    return made


def prepare(planes: int, dtype: mx.Dtype) -> None:
    """Begin to compile it, for so many planes of a type."""
    _begin(planes, dtype)


def source(planes: int) -> str:
    """The kernel's, for so many planes."""
    text = BEGIN.replace("PLANES", "\n".join(f"case {i}: plane = plane{i}; break;" for i in range(planes)))
    text = text.replace("PIECES", "\n".join(f"case {i}: stack = stack{i}; break;" for i in range(PIECES)))
    return cuda_kernels.terse(text)


def inputs(dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What it calls a call's arrays, and their types."""
    return {f"stack{i}": dtype for i in range(PIECES)} | {"span": mx.int32}


def outputs(planes: int, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """The same of what it returns."""
    return {f"plane{i}": dtype for i in range(planes)}


@cache
def _begin(planes: int, dtype: mx.Dtype) -> Kernel:
    return Kernel(
        name=f"begin_{planes}_planes",
        inputs=inputs(dtype),
        outputs=outputs(planes, dtype),
        source=source(planes),
        template=[("T", dtype), *copy_kernel.constants().items()],
    )
