"""The product of up to 128 tokens in which each row has its own low-rank change, in one launch on Hopper GPUs.

What it gives is what `wide_changes` does in two launches, of which each costs the host 5 µs: to the bit, where as many
blocks share K. Blocks that come first compute the tokens' inner products with all slots' ranks; the others need them
only in the end, and have threads of their own that get them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import mlx.core as mx
from msgspec.structs import replace

from runner.engine import wide_product_kernel
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Span, Stack
from runner.engine.changed_source import CHANGED_DEVICE
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel, Size
from runner.engine.product_kernel import Changed, no_sum
from runner.engine.wide_changed_source import CHANGED, IN_A_RESULT, IN_A_ROOM, MEETINGS, RESIDUAL
from runner.engine.wide_product_kernel import GROUP, GROUP_THREADS, ROOM, TOKENS, Between, Choose, Way, in_a_room

MOST_SLOTS: Final = 64

SIDE: Final = 128
"""Threads that a block has beside those that multiply."""

_MOST_GROUPS: Final = 2
"""Of threads that multiply: more leave too few registers to each, with those at the side."""

_RANKS: Final = 4
"""That are read at once."""

_CHUNKS, _FEW_CHUNKS = 8, 4
"""Of 64 inputs, that a block with inner products has at least: where all blocks run at once, and where not."""

_PIECES: Final = 4
"""At most: so many multiprocessors are left idle where the weight has a block for each."""

_SHARING: Final = 4
"""Blocks that share K where a weight has few lines."""

_MOST_PIECES: Final = 16
"""The same where some blocks wait for the first to end."""

_KNOWN: Final = 2048
"""Bytes of shared memory for what is known of rows and slots, at most."""

_BESIDE: Final = 28 * 1024
"""Bytes of it beside the chunks, for each 64 lines: what the changes of ten slots of rank 16 take, which come while
chunks are multiplied then."""


def way(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    """For a weight [outputs, inputs] (of a gate, and as many of its input, for "swiglu"): that of the product without
    changes, so that a row without one has the same bits."""
    return _shared(outputs, inputs, tokens, epilogue, _CHUNKS, _PIECES)


def yielding(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    """The same for changes of more ranks than that leaves multiprocessors for: where four blocks share K, three do, and
    leave many; or else two blocks share it for inner products. So where K is shared, sums have another order."""
    usual = _shared(outputs, inputs, tokens, epilogue, _FEW_CHUNKS, _MOST_PIECES)
    return replace(usual, splits=3) if usual.splits == _SHARING else replace(usual, pieces=min(usual.pieces, 2))


def shorter(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    """The same for changes of so many ranks that their blocks and the weight's do not run at once: the first end
    soon."""
    return _shared(outputs, inputs, tokens, epilogue, _FEW_CHUNKS, _MOST_PIECES)


def _shared(outputs: int, inputs: int, tokens: int, epilogue: str, chunks: int, most: int) -> Way:
    usual = wide_product_kernel.way(outputs, inputs, tokens, epilogue)
    ring = beside(replace(usual, stages=0), tokens) - usual.groups * _BESIDE
    usual = replace(usual, stages=min(usual.stages, ring // usual.chunk(tokens)))
    return replace(usual, pieces=min(max(1, inputs // (64 * chunks)), most))


def at_once(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack) -> bool:
    """Whether `way` is one for such changes: there is a kernel, and its first blocks leave room for the others, or
    those had to wait for each other anyway."""
    slots, ranks, _ = stack.down.shape
    if not fits(outputs, inputs, dtype, epilogue, stack):
        return False
    return _waits_anyway(outputs, inputs, epilogue) or _run_together(outputs, inputs, epilogue, slots, ranks, way)


def yields(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack) -> bool:
    """The same of `yielding`, whose blocks all run at once."""
    slots, ranks, _ = stack.down.shape
    there = fits(outputs, inputs, dtype, epilogue, stack, yielding)
    return there and _run_together(outputs, inputs, epilogue, slots, ranks, yielding)


def fits(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, stack: Stack, choose: Choose = way) -> bool:
    """Whether there is a kernel for such changes to a weight [outputs, inputs] (of a gate, and as many of its input,
    for "swiglu"). It depends on shapes, and where the outputs' parts end, as kept graphs do."""
    slots, ranks, _ = stack.down.shape
    if not wide_product_kernel.fits_inner(outputs * parts(epilogue), inputs, dtype, stack):
        return False
    return _have_room(outputs, inputs, epilogue, slots, ranks, stack.spans[0], choose)


Fits = Callable[[int, int, mx.Dtype, str, Stack], bool]
"""Whether there is a kernel for such changes: as `fits`."""

WAYS: Final[tuple[tuple[Choose, Fits], ...]] = ((way, at_once), (yielding, yields), (shorter, fits))
"""What may be chosen, and for what changes: the first that fits them."""


# All are asked in each step, for each layer.
@cache
def _waits_anyway(outputs: int, inputs: int, epilogue: str) -> bool:
    usual = way(outputs, inputs, TOKENS[-1], epilogue)
    return wide_product_kernel.blocks(outputs, usual, epilogue) * usual.splits > PROCESSORS


@cache
def _run_together(outputs: int, inputs: int, epilogue: str, slots: int, ranks: int, choose: Choose) -> bool:
    way = choose(outputs, inputs, TOKENS[-1], epilogue)
    own = wide_product_kernel.blocks(outputs, way, epilogue) * way.splits
    return own + inner_blocks(way, slots, ranks) <= PROCESSORS


@cache
def _have_room(
    outputs: int, inputs: int, epilogue: str, slots: int, ranks: int, ends: tuple[Span, ...], choose: Choose
) -> bool:
    if slots > MOST_SLOTS or ranks % _RANKS:
        return False
    return all(
        way.groups <= _MOST_GROUPS
        and room(way, tokens, epilogue, slots, ranks) <= way.ring(tokens) + beside(way, tokens)
        and all(end % (way.groups * GROUP // parts(epilogue)) == 0 for end, _, _ in ends)
        for tokens in TOKENS
        for way in [choose(outputs, inputs, tokens, epilogue)]
    )


def room(way: Way, tokens: int, epilogue: str, slots: int, ranks: int) -> int:
    """Bytes of shared memory that sums, what is added to them, and changes of any spans take once the product is
    there."""
    lines = way.groups * GROUP
    outputs = lines // parts(epilogue)
    changes = (slots - 1) * ranks * lines * 2 + tokens * (parts(epilogue) * ranks + 4) * 4
    return tokens * (lines + 4) * 4 + tokens * outputs * 2 + changes


def beside(way: Way, tokens: int) -> int:
    """Bytes of it that changes may have while the product is computed."""
    return ROOM - _KNOWN - way.shared_memory(tokens)


def changed(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain", choose: Choose = way) -> Changed:
    """The product with one weight in which each row has its own change, prepared."""
    ways = [choose(outputs, inputs, most, epilogue) for most in TOKENS]
    prepared = [_prepare(outputs, way, most, dtype, epilogue) for way, most in zip(ways, TOKENS, strict=True)]
    by_rows = wide_product_kernel.each_number(prepared)
    rest, dtypes = no_sum(dtype, epilogue), [dtype, mx.float32]

    def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
        rows = x.size // inputs
        way, kernel, width, between = by_rows[rows]
        count, ranks, _ = stack.down.shape
        threads: Size = (way.groups * GROUP_THREADS + SIDE, 1, 1)
        arrays, results = between(rows, way.pieces * count * ranks)
        result: mx.array = kernel.launch(
            inputs=[x, weight, *(rest if added is None else (added,)), stack.packed, slots.board(), *arrays],
            grid=((width + inner_blocks(way, count, ranks)) * threads[0], 1, 1),
            threadgroup=threads,
            output_shapes=[(*x.shape[:-1], outputs), *results],
            output_dtypes=dtypes[: 1 + len(results)],
        )[0]
        return result

    return call


def inner_blocks(way: Way, slots: int, ranks: int) -> int:
    """How many blocks come first."""
    return -(-slots * ranks // (way.groups * GROUP + SIDE // 2)) * way.pieces


def source(way: Way, tokens: int, epilogue: str) -> str:
    """The kernel's text."""
    left = {"LEFT": IN_A_ROOM if in_a_room(tokens, epilogue) else IN_A_RESULT}
    return wide_product_kernel.source(way, tokens, epilogue, CHANGED | left | RESIDUAL[epilogue])


def constants(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What the source does not say."""
    return wide_product_kernel.constants(way, tokens, dtype, epilogue) + _more_constants(way, tokens)


def header(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What comes before it."""
    usual = wide_product_kernel.header(way, tokens, dtype, epilogue)
    return usual + _more_constants(way, tokens) + CHANGED_DEVICE + MEETINGS


def _more_constants(way: Way, tokens: int) -> str:
    return f"constexpr int MOST_SLOTS = {MOST_SLOTS}, SIDE = {SIDE}, BESIDE = {beside(way, tokens)};\n"


def inputs_of(way: Way, tokens: int, epilogue: str, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    usual = wide_product_kernel.inputs_of(way, tokens, epilogue, dtype)
    left: dict[str, mx.Dtype] = {name: usual.pop(name) for name in ("counters", "told") if name in usual}
    if in_a_room(tokens, epilogue):
        left["room"] = mx.float32
    return usual | {"changes": dtype, "board": mx.int32} | left


def outputs_of(tokens: int, dtype: mx.Dtype, epilogue: str) -> dict[str, mx.Dtype]:
    """The same of what it writes."""
    return {"out": dtype} if in_a_room(tokens, epilogue) else {"out": dtype, "left": mx.float32}


_Prepared = tuple[Way, Kernel, int, Between]


def _prepare(outputs: int, way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> _Prepared:
    """The kernel, its blocks that have outputs, and where all of them leave numbers for each other."""
    count = wide_product_kernel.blocks(outputs, way, epilogue) * way.splits
    left = wide_product_kernel.between(outputs, way, tokens, epilogue)
    return way, _kernel(way, tokens, dtype, epilogue), count, left


@cache
def _kernel(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> Kernel:
    sizes = f"{way.groups}_{way.stages}_{way.splits}_{way.pieces}_{tokens}"
    return Kernel(
        name=f"wide_changed_{epilogue}_{KINDS[dtype][1]}_{sizes}",
        inputs=inputs_of(way, tokens, epilogue, dtype),
        outputs=outputs_of(tokens, dtype, epilogue),
        source=source(way, tokens, epilogue),
        header=header(way, tokens, dtype, epilogue),
        shared_memory=way.shared_memory(tokens) + beside(way, tokens),
    )
