"""The product of up to 128 tokens with a layer's weight, in one launch on Hopper GPUs.

The device takes about as long for it as with cuBLAS (up to 1.9 times for the smallest weights, less for an MLP's, on an
H200), but the host does not: cuBLAS takes 16 µs more a call, which is 1 to 1.4 ms of a step (`product_kernel`, which is
faster for up to 16 tokens, but for gates). Its epilogues are the same, and a row's result is the same bits in any batch
of so many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Final, TypeVar

import mlx.core as mx
import msgspec
from msgspec.structs import replace

from runner.engine import cuda_kernels, kernel_cache, product_kernel
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import KINDS, PROCESSORS, Kernel, Size
from runner.engine.product_kernel import Multiply
from runner.engine.product_source import SWIGLU
from runner.engine.split_k_source import ALONE, SHARED, TOLD
from runner.engine.tensor_cores import DEVICE
from runner.engine.wide_product_source import BODY, CHANGES, EPILOGUES, PLAIN, device

T = TypeVar("T")

SWITCH: Final = "MLX_RUN_WIDE_PRODUCT_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

TOKENS: Final = (32, 64, 128)
"""How many there is a kernel for."""

MOST_ROWS: Final = TOKENS[-1]

_ARCHITECTURE: Final = "sm_90a"
"""Whose tensor cores read shared memory."""

GROUP: Final = 64
"""Lines of a weight that four warps take."""

_CHUNK: Final = 64
_EIGHT: Final = 8
GROUP_THREADS: Final = 128
_ALIGNED: Final = 1024
ROOM: Final = 227 * 1024
"""Bytes of shared memory that a block can have."""

_FEW_RANKS: Final = 4
"""Ranks of all slots are at most a part of so many of a weight's outputs."""


class Way(msgspec.Struct, frozen=True):
    """How a product is shared out: `groups` × 64 lines of weights a block, `stages` chunks of 64 inputs in shared
    memory, `splits` blocks that share K, `pieces` those that share it for inner products of changes. The last two are
    all that the order of a sum depends on."""

    groups: int
    stages: int
    splits: int
    pieces: int = 1

    def chunk(self, tokens: int) -> int:
        """Bytes of shared memory that one has."""
        return (self.groups * GROUP + tokens) * _CHUNK * 2

    def ring(self, tokens: int) -> int:
        """Those of all."""
        return self.stages * self.chunk(tokens)

    def shared_memory(self, tokens: int) -> int:
        """Bytes of it that a block has."""
        return self.ring(tokens) + _ALIGNED


def way(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    """For a weight [outputs, inputs] (of a gate, and as many of its input, for "swiglu"); `splits` and `pieces` do not
    depend on `tokens`."""
    usual = _way(outputs, inputs, tokens, epilogue)
    return replace(usual, pieces=_pieces(inputs)) if epilogue == "changes" else usual


def _pieces(inputs: int) -> int:
    """So short that the multiprocessors which the product leaves idle are done with theirs when it is."""
    return max(1, inputs // (8 * _CHUNK))


def _way(outputs: int, inputs: int, tokens: int, epilogue: str) -> Way:
    lines = outputs * parts(epilogue)
    if lines >= PROCESSORS * 2 * GROUP * 4 and lines % (4 * GROUP) == 0:
        # Tokens are read again by each block, so a block has many lines where that leaves enough of them.
        return Way(4, 5 if tokens <= 64 else 4, 1)
    if lines >= (PROCESSORS - 8) * 2 * GROUP and lines % (2 * GROUP) == 0:
        return Way(2, 8 if tokens <= 64 else 6, 1)
    splits = 1
    while splits < 4 and lines // GROUP * splits * 2 <= PROCESSORS and inputs >= splits * 2 * 4 * _CHUNK:
        splits *= 2
    return Way(1, 8, splits)


def fits(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain") -> bool:
    """Whether there is a kernel for a weight [outputs, inputs], as `way` has it."""
    return dtype in KINDS and outputs * parts(epilogue) % GROUP == 0 and inputs % _CHUNK == 0


Choose = Callable[[int, int, int, str], Way]


def multiply(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str = "plain", choose: Choose = way) -> Multiply:
    """The product with one weight, prepared, for up to MOST_ROWS tokens."""
    prepared = [_prepare(outputs, choose(outputs, inputs, most, epilogue), most, dtype, epilogue) for most in TOKENS]
    by_rows = each_number(prepared)
    rest, dtypes = product_kernel.no_sum(dtype, epilogue), [dtype, mx.float32]

    def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        rows = x.size // inputs
        kernel, grid, threads, between = by_rows[rows]
        arrays, results = between(rows, 0)
        result: mx.array = kernel.launch(
            inputs=[x, weight, *(rest if added is None else (added,)), *arrays],
            grid=grid,
            threadgroup=threads,
            output_shapes=[(*x.shape[:-1], outputs), *results],
            output_dtypes=dtypes[: 1 + len(results)],
        )[0]
        return result

    return call


Inner = Callable[[mx.array, mx.array, Stack], tuple[mx.array, mx.array]]
"""From tokens, the weight and a stack of changes to it: the product, and the tokens' inner products with `down` of all
slots, [pieces, tokens, slots, ranks] in float32, each the sum of its pieces."""


def fits_inner(outputs: int, inputs: int, dtype: mx.Dtype, stack: Stack) -> bool:
    """Whether there is a kernel for such changes to a weight [outputs, inputs]. Ranks cost as much as outputs do."""
    slots, ranks, width = stack.down.shape[0], stack.down.shape[-2], stack.down.shape[-1]
    return (
        fits(outputs, inputs, dtype, "changes")
        and stack.packed is not None
        and stack.down.dtype == dtype
        and (stack.b.shape[-1], width) == (outputs, inputs)
        and 0 < slots * ranks <= outputs // _FEW_RANKS
        and slots * ranks % 4 == 0
    )


def with_inner(outputs: int, inputs: int, dtype: mx.Dtype, choose: Choose = way) -> Inner:
    """The product with one weight and the inner products of its changes, prepared."""
    ways = [choose(outputs, inputs, most, "changes") for most in TOKENS]
    prepared = [(way, *_prepare(outputs, way, most, dtype, "changes")) for way, most in zip(ways, TOKENS, strict=True)]
    by_rows = each_number(prepared)
    dtypes = [dtype, mx.float32, mx.float32]

    def call(x: mx.array, weight: mx.array, stack: Stack) -> tuple[mx.array, mx.array]:
        rows = x.size // inputs
        way, kernel, (width, _, _), threads, between = by_rows[rows]
        slots, ranks, _ = stack.down.shape
        more = -(-slots * ranks // (way.groups * GROUP)) * way.pieces * threads[0]
        arrays, results = between(rows, 0)
        y, inner, *_ = kernel.launch(
            inputs=[x, weight, stack.packed, *arrays],
            grid=(width + more, 1, 1),
            threadgroup=threads,
            output_shapes=[(*x.shape[:-1], outputs), (way.pieces, rows, slots, ranks), *results],
            output_dtypes=dtypes[: 2 + len(results)],
        )
        return y, inner

    return call


def each_number(prepared: Sequence[T]) -> list[T]:
    """What was prepared for each of TOKENS, by the number of tokens, up to MOST_ROWS."""
    return [prepared[sum(rows > most for most in TOKENS[:-1])] for rows in range(MOST_ROWS + 1)]


def usable() -> bool:
    """Whether there is a device for it, and the switch is not off."""
    return cuda_kernels.usable(SWITCH) and kernel_cache.architecture() == _ARCHITECTURE


def in_a_room(tokens: int, epilogue: str) -> bool:
    """Whether what blocks leave for each other is in an array that stays, not a result of the launch: the host is what
    takes long with few tokens, and arrays for many would be large."""
    return tokens == TOKENS[0] and epilogue != "changes"


def source(way: Way, tokens: int, epilogue: str, lines: Mapping[str, str] | None = None) -> str:
    """The kernel's text; `lines` are what stands in it beside the product of a weight's lines."""
    text = BODY
    shares = ALONE
    if way.splits > 1:
        shares = TOLD if in_a_room(tokens, epilogue) else SHARED
    if lines is None:
        lines = CHANGES if epilogue == "changes" else PLAIN
    # Those that share K are in what `lines` are as well.
    for places in (shares, lines, shares, EPILOGUES[epilogue]):
        text = cuda_kernels.filled(text, places)
    return cuda_kernels.terse(text)


def constants(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What the source does not say."""
    kind, operand = KINDS[dtype]
    return (
        f'using T = {kind};\n#define KIND "{operand}"\n'
        f"constexpr int GROUPS = {way.groups}, STAGES = {way.stages}, SPLITS = {way.splits};\n"
        f"constexpr int TOKENS = {tokens}, PARTS = {parts(epilogue)}, PIECES = {way.pieces};\n"
    )


def header(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> str:
    """What comes before it."""
    texts = [constants(way, tokens, dtype, epilogue), DEVICE, device(tokens, KINDS[dtype][1])]
    return "".join([*texts, SWIGLU] if epilogue == "swiglu" else texts)


def inputs_of(way: Way, tokens: int, epilogue: str, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    names = ["x", "w", "changes"] if epilogue == "changes" else product_kernel.inputs_of(epilogue)
    arrays = dict.fromkeys(names, dtype)
    if way.splits > 1:
        name, kind = ("told", mx.float32) if in_a_room(tokens, epilogue) else ("counters", mx.int32)
        arrays[name] = kind
    return arrays


def outputs_of(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> dict[str, mx.Dtype]:
    """The same of what it writes."""
    sums = ["inner"] if epilogue == "changes" else []
    sums += ["partial"] if way.splits > 1 and not in_a_room(tokens, epilogue) else []
    return {"out": dtype} | dict.fromkeys(sums, mx.float32)


def blocks(outputs: int, way: Way, epilogue: str) -> int:
    """That have outputs of their own, each of which `way.splits` share. A weight's lines have to be whole blocks."""
    lines = outputs * parts(epilogue)
    assert lines % (way.groups * GROUP) == 0
    return lines // (way.groups * GROUP)


Between = Callable[[int, int], tuple[list[mx.array], list[tuple[int]]]]
"""Where the blocks of a launch leave numbers for each other, from how many tokens there are, and how many inner
products each has: further arrays, and the shapes of further results."""


def between(outputs: int, way: Way, tokens: int, epilogue: str) -> Between:
    """That of the product with a weight."""
    count = blocks(outputs, way, epilogue)
    lines = count * way.groups * GROUP
    if in_a_room(tokens, epilogue):
        return partial(_few_between, lines * (way.splits - 1))
    shared = way.splits > 1
    return partial(_many_between, lines * way.splits * shared, cuda_kernels.counters(count) if shared else None)


def _few_between(told: int, rows: int, inner: int) -> tuple[list[mx.array], list[tuple[int]]]:
    arrays = [cuda_kernels.exchange(told * -(-rows // _EIGHT) * _EIGHT)] if told else []
    return [*arrays, cuda_kernels.room(rows * inner)] if inner else arrays, []


def _many_between(
    sums: int, counters: Iterator[mx.array] | None, rows: int, inner: int
) -> tuple[list[mx.array], list[tuple[int]]]:
    floats = rows * (sums + inner)
    return [] if counters is None else [next(counters)], [(floats,)] if floats else []


_Prepared = tuple[Kernel, Size, Size, Between]


def _prepare(outputs: int, way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> _Prepared:
    """The kernel, its grid and block, and where these leave numbers for each other."""
    assert way.shared_memory(tokens) <= ROOM
    threads = way.groups * GROUP_THREADS
    grid = (blocks(outputs, way, epilogue) * way.splits * threads, 1, 1)
    left = between(outputs, way, tokens, epilogue)
    return _kernel(way, tokens, dtype, epilogue), grid, (threads, 1, 1), left


@cache
def _kernel(way: Way, tokens: int, dtype: mx.Dtype, epilogue: str) -> Kernel:
    return Kernel(
        name=f"wide_{epilogue}_{KINDS[dtype][1]}_{way.groups}_{way.stages}_{way.splits}_{way.pieces}_{tokens}",
        inputs=inputs_of(way, tokens, epilogue, dtype),
        outputs=outputs_of(way, tokens, dtype, epilogue),
        source=source(way, tokens, epilogue),
        header=header(way, tokens, dtype, epilogue),
        shared_memory=way.shared_memory(tokens),
    )
