"""The product of 33 to 128 tokens in which each row has its own low-rank change, in one launch on Hopper GPUs.

What it gives is what `wide_changes` does in two launches, to the bit, of which each costs the host 5 µs. Blocks that
come first compute the tokens' inner products with all slots' ranks; the others need them only in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import mlx.core as mx
from msgspec.structs import replace

from runner.engine import cuda_kernels, wide_product_kernel
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.changed_source import CHANGED_DEVICE
from runner.engine.cuda_kernels import KINDS, Kernel, Size
from runner.engine.product_kernel import Changed, no_sum
from runner.engine.wide_changed_source import CHANGED
from runner.engine.wide_product_kernel import GROUP, GROUP_THREADS, TOKENS, Choose, Way

MOST_SLOTS: Final = 64

_RANKS: Final = 4
"""That are read at once."""

_CHUNKS: Final = 8
"""Of 64 inputs, that a block with inner products has: where others have all of K, twice as many."""


_MOST_PIECES: Final = 16
"""A thread has as many float4 on their way."""


def way(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    """For a weight [outputs, inputs] (of a gate, and as many of its input, for "swiglu"): that of the product without
    changes, so that a row without one has the same bits."""
    usual = wide_product_kernel.way(outputs, inputs, tokens, epilogue)
    pieces = inputs // (64 * _CHUNKS * (1 if usual.splits > 1 else 2))
    return replace(usual, pieces=min(max(1, pieces), _MOST_PIECES))


def fits(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack, choose: Choose = way) -> bool:
    """Whether there is a kernel for such changes to a weight [outputs, inputs] (of a gate, and as many of its input,
    for "swiglu"). It depends on shapes, and where the outputs' parts end, as kept graphs do."""
    slots, ranks, _ = stack.down.shape
    if not wide_product_kernel.fits_inner(outputs * parts(epilogue), inputs, dtype, stack):
        return False
    if slots > MOST_SLOTS or ranks % _RANKS:
        return False
    return all(
        room(way, tokens, epilogue, slots, ranks) <= way.ring(tokens)
        and all(end % (way.groups * GROUP // parts(epilogue)) == 0 for end, _, _ in stack.spans[0])
        for tokens in TOKENS
        for way in [choose(outputs, inputs, tokens, epilogue)]
    )


def room(way: Way, tokens: int, epilogue: str, slots: int, ranks: int) -> int:
    """Bytes of shared memory that sums, and changes of any spans, take once the product is there."""
    lines = way.groups * GROUP
    return tokens * (lines + 4) * 4 + (slots - 1) * ranks * lines * 2 + tokens * parts(epilogue) * ranks * 4


def changed(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain", choose: Choose = way) -> Changed:
    """The product with one weight in which each row has its own change, prepared."""
    ways = [choose(outputs, inputs, most, epilogue) for most in TOKENS]
    prepared = [_prepare(outputs, way, most, dtype, epilogue) for way, most in zip(ways, TOKENS, strict=True)]
    by_rows = wide_product_kernel.each_number(prepared)
    rest = no_sum(dtype, epilogue)
    dtypes = [dtype, mx.float32, mx.float32]

    def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
        rows = x.size // inputs
        way, kernel, width, shared, counters = by_rows[rows]
        count, ranks, _ = stack.down.shape
        threads: Size = (way.groups * GROUP_THREADS, 1, 1)
        shapes = [(*x.shape[:-1], outputs), (way.pieces, rows, count, ranks), (shared * rows,)]
        arrays = [x, weight, *(rest if added is None else (added,)), stack.packed, slots.board()]
        many = 3 if shared else 2
        result: mx.array = kernel.launch(
            inputs=[*arrays, next(counters)] if shared else arrays,
            grid=((width + inner_blocks(way, count, ranks)) * threads[0], 1, 1),
            threadgroup=threads,
            output_shapes=shapes[:many],
            output_dtypes=dtypes[:many],
        )[0]
        return result

    return call


def inner_blocks(way: Way, slots: int, ranks: int) -> int:
    """How many blocks come first."""
    return -(-slots * ranks // (way.groups * GROUP)) * way.pieces


def source(way: Way, epilogue: str) -> str:
    """The kernel's text."""
    return wide_product_kernel.source(way, epilogue, CHANGED)


def constants(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What the source does not say."""
    usual = wide_product_kernel.constants(way, tokens, dtype, epilogue)
    return f"{usual}constexpr int MOST_SLOTS = {MOST_SLOTS};\n"


def header(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What comes before it."""
    usual = wide_product_kernel.header(way, tokens, dtype, epilogue)
    return f"{usual}constexpr int MOST_SLOTS = {MOST_SLOTS};\n{CHANGED_DEVICE}"


def inputs_of(way: Way, epilogue: str, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    usual = wide_product_kernel.inputs_of(way, epilogue, dtype)
    counters = {name: usual.pop(name) for name in ["counters"] if name in usual}
    return usual | {"changes": dtype, "board": mx.int32} | counters


def outputs_of(way: Way, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """The same of what it writes."""
    return {"out": dtype, "inner": mx.float32} | ({"partial": mx.float32} if way.splits > 1 else {})


_Prepared = tuple[Way, Kernel, int, int, Iterator[mx.array]]


def _prepare(outputs: int, way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> _Prepared:
    """The kernel, its blocks that have outputs, how many sums a token has beside its result, counters for launches."""
    count = wide_product_kernel.blocks(outputs, way, epilogue)
    shared = count * way.splits * way.groups * GROUP if way.splits > 1 else 0
    counters = cuda_kernels.counters(count) if shared else iter(())
    return way, _kernel(way, tokens, dtype, epilogue), count * way.splits, shared, counters


@cache
def _kernel(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> Kernel:
    sizes = f"{way.groups}_{way.stages}_{way.splits}_{way.pieces}_{tokens}"
    return Kernel(
        name=f"wide_changed_{epilogue}_{KINDS[dtype][1]}_{sizes}",
        inputs=inputs_of(way, epilogue, dtype),
        outputs=outputs_of(way, dtype),
        source=source(way, epilogue),
        header=header(way, tokens, dtype, epilogue),
        shared_memory=way.shared_memory(tokens),
    )
