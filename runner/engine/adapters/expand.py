"""What is left of rows' low-rank changes where their inner products are there, in one launch on CUDA.

The product of 33 to 128 tokens computes those as if they were more of its outputs (`wide_product_kernel.py`). What this
launch writes is what `kernel.add_changes` would, given the same inner products; a thread has its product, its slot's
ranks and what is to be added on their way at once.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.adapters.expand_source import BY_VECTOR, PLACES, ROOM, TILED
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import KINDS, Kernel, Size
from runner.engine.product_source import SWIGLU

MOST_RANK: Final = 512
"""Of all parts of a layer together."""

_MOST_SLOTS: Final = 256
_VECTOR: Final = 8
_SHARED: Final = 96 * 1024
"""Bytes of shared memory that a block may have, so that a multiprocessor has two."""


class Way(msgspec.Struct, frozen=True):
    """How a launch is shared out: `threads` a block, `at_once` ranks on their way to a thread together; where there are
    `rows`, blocks of up to so many and of `vectors` × 8 outputs have all slots' ranks in shared memory."""

    threads: int
    at_once: int
    rows: int = 0
    vectors: int = 8

    def grid(self, tokens: int, outputs: int) -> Size:
        """Of threads."""
        if not self.rows:
            return tokens * -(-outputs // (_VECTOR * self.threads)) * self.threads, 1, 1
        return -(-tokens // self.rows) * outputs // (_VECTOR * self.vectors) * self.threads, 1, 1

    def fits(self, stack: Stack, epilogue: str) -> bool:
        """Whether it is one for such changes."""
        if not self.rows:
            return True
        slots, ranks, _ = stack.down.shape
        tile = _VECTOR * self.vectors
        size = slots * ranks * parts(epilogue) * tile * 2 + self.rows * ranks * 4
        whole = all(end % tile == 0 for end, _, _ in stack.spans[0])
        return slots <= _MOST_SLOTS and size <= _SHARED and whole and stack.b.shape[2] % (tile * parts(epilogue)) == 0


BY_VECTOR_WAY: Final = {"plain": Way(128, 8), "swiglu": Way(128, 4)}
TILED_WAY: Final = Way(512, 4, 128)


def way(stack: Stack, epilogue: str) -> Way:
    """An MLP's gate and input have so many outputs that it pays to read the ranks once."""
    return TILED_WAY if epilogue == "swiglu" and TILED_WAY.fits(stack, epilogue) else BY_VECTOR_WAY[epilogue]


def fits(stack: Stack) -> bool:
    """Whether there is a kernel for such changes."""
    return (
        stack.packed is not None
        and stack.down.dtype in KINDS
        and stack.down.shape[1] <= MOST_RANK
        and all(end % _VECTOR == 0 for end, _, _ in stack.spans[0])
    )


def expand(
    y: mx.array,
    inner: mx.array,
    stack: Stack,
    board: mx.array,
    added: mx.array,
    epilogue: str = "plain",
    how: Way | None = None,
) -> mx.array:
    """y plus each row's change, plus what is `added`, unless that has one axis; for "swiglu", which looks at no
    `added`, a gate and an MLP's input made one.

    y is [rows, tokens, out], or [rows · tokens, out], and `inner` [pieces, rows · tokens, slots, ranks] the tokens'
    inner products with `down` of all slots, in float32; `board` one of the rows'. The result is of y's shape, or half
    as wide for "swiglu".
    """
    how = how or way(stack, epilogue)
    outputs = y.shape[-1] // parts(epilogue)
    rest = [] if epilogue == "swiglu" else [added]
    result: mx.array = kernel(y.dtype, epilogue, how).launch(
        inputs=[y, inner, *rest, stack.packed, board],
        grid=how.grid(inner.shape[1], outputs),
        threadgroup=(how.threads, 1, 1),
        output_shapes=[(*y.shape[:-1], outputs)],
        output_dtypes=[y.dtype],
    )[0]
    return result


def prepare(dtype: mx.Dtype, epilogue: str) -> None:
    """Begin to compile."""
    kernel(dtype, epilogue, BY_VECTOR_WAY[epilogue])
    if epilogue == "swiglu":
        kernel(dtype, epilogue, TILED_WAY)


def source(epilogue: str, how: Way) -> str:
    """The kernel's text."""
    return cuda_kernels.terse(cuda_kernels.filled(TILED if how.rows else BY_VECTOR, PLACES[epilogue]))


def constants(dtype: mx.Dtype, epilogue: str, how: Way) -> str:
    """What the source does not say."""
    return (
        f"using T = {KINDS[dtype][0]};\nconstexpr int THREADS = {how.threads}, PARTS = {parts(epilogue)};\n"
        f"constexpr int AT_ONCE = {how.at_once}, ROWS = {how.rows}, VECTORS = {how.vectors};\n"
        f"constexpr int MOST_RANK = {MOST_RANK}, MOST_SLOTS = {_MOST_SLOTS};\n"
    )


def header(dtype: mx.Dtype, epilogue: str, how: Way) -> str:
    """What comes before it."""
    return constants(dtype, epilogue, how) + ROOM + (SWIGLU if epilogue == "swiglu" else "")


def inputs_of(epilogue: str, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    rest = {} if epilogue == "swiglu" else {"added": dtype}
    return {"y": dtype, "inner": mx.float32, **rest, "changes": dtype, "board": mx.int32}


@cache
def kernel(dtype: mx.Dtype, epilogue: str, how: Way) -> Kernel:
    """Begins to be compiled when it is first wanted."""
    return Kernel(
        name=f"expand_{epilogue}_{KINDS[dtype][1]}_{how.threads}_{how.at_once}_{how.rows}_{how.vectors}",
        inputs=inputs_of(epilogue, dtype),
        outputs={"out": dtype},
        source=source(epilogue, how),
        header=header(dtype, epilogue, how),
        shared_memory=_SHARED if how.rows else 0,
    )
