"""New tokens' keys and values written, and attended to, in one launch on CUDA.

While few rows decode, a step takes as long as the host takes to launch its operations. For rows of different lengths a
layer's attention is eight of them: a copy of the values, two scatters, a scale, a product, a mask, a softmax and a
product. Here a block of threads takes one new token of one row, and the query heads of one key head: it puts the
token's key and value in their places, and attends to what came before (`attention_source.py`). Nothing is masked: a
block knows how many keys its token sees, and reads no others. In 16 bits, and where heads are wide, tensor cores do it
for several tokens of a row at once (`decode_kernel.py`).

**Writing in place.** MLX's kernels return fresh arrays, and a copy of the planes is what has to be avoided; so the
planes are inputs, and the kernel casts `const` away. MLX takes arrays for values. What it does not know is made up for:

- *Within a launch*, blocks run in any order. None looks at what it reads of a place that another writes: keys and
  values of the call's own tokens are taken from the new arrays, and what a ring's places held before is out of the
  window of every token of the call, since a call is wider than the ring's slack by one token at most (Window).
- *Launch after launch.* MLX orders the kernels of a CUDA graph by the buffers that they are said to write, and those of
  different graphs, which every evaluation ends with, by the stream. So each launch takes the output of the layer's
  launch before (`Call.after`) as an input: whether they are in one graph (a draft's proposals, chunks of a prompt that
  nobody has asked for yet) or not, the planes are complete when they are read.
- *All other readers and writers* of the planes (they grow, shrink, move, are copied from, pasted into, and calls that
  no launch can do write and read them in separate operations) begin with `Planes.land`, which has the launch before
  dispatched: theirs is then a later graph. Launches of `copy_kernel` that write are among them, and are started at
  once: what comes after them is in a later graph again. `Caches.arrays` lists the launches' outputs, so that whoever
  starts the caches' arrays starts them, even if nobody wants what they have attended to.
- *Who holds an older value* of the planes sees the write. For layers that cache all tokens it is dead to them: places
  at or behind a row's length mean nothing to anyone, tokens are cut off only after what attended to them was needed to
  know how many, and a slot is given to another row by copying into it: MLX's own writing copies an array that others
  hold, and before a launch does it, whatever copies from a row has been started (`Caches.piece`). A ring's places are
  used again: so what is kept of a ring, and what a ring begins with, are copies that share no memory with it and are
  started at once (Window), and a call that reads a ring in separate operations has to be started before the next call,
  as whoever calls a model here does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel
from runner.engine.kv import decode_kernel
from runner.engine.kv.attention_source import HEADER, SOURCE
from runner.engine.kv.calls import Call, Held, JoinedCall, JoinedLaunch, Launch, Planes
from runner.engine.kv.masks import FEW
from runner.engine.kv.rotary import Rotation

SWITCH: Final = "MLX_RUN_ATTENTION_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

_WARPS: Final = (4, 2, 1)
"""Of a block, as many as have room. Three of 128 have room on a multiprocessor, of 256 one, which waits by itself."""

_WARP: Final = 32
_VECTOR: Final = 16
"""Bytes of a load."""

_REGISTERS: Final = 64
"""Values of the queries that a lane holds at most; it sums up as many."""

_SHARED: Final = 48_000
"""Bytes of shared memory that a kernel has without asking for more."""

_BLOCKS: Final = 256
"""Blocks that are wanted at least: two for each multiprocessor of a large GPU. Where rows, heads and tokens make fewer,
several share a row's keys."""

_SHARE: Final = 128
"""Places that are worth a block."""

_MOST_SPLITS: Final = 32
INPUTS: Final = ("queries", "keys", "values", "held_keys", "held_values", "starts", "after", "counters", "frequencies")
"""What the source calls a call's arrays."""


def few_alike(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether they are of few tokens, of one type that kernels take, and heads that share keys are whole numbers."""
    _, heads, tokens, width = queries.shape
    return (
        tokens <= FEW
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in (mx.bfloat16, mx.float16, mx.float32)
        and keys.shape == values.shape
        and keys.shape[3] == width
        and heads % keys.shape[1] == 0
    )


def applies(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether a launch can do it: few tokens, whole vectors."""
    heads, width = queries.shape[1], queries.shape[3]
    return (
        few_alike(queries, keys, values)
        and width * queries.dtype.size % _VECTOR == 0
        and shape(width, queries.dtype.size, heads // keys.shape[1]) is not None
    )


class Shape(msgspec.Struct, frozen=True):
    """How a block's threads share the work: `lanes` a key, `heads` queries a block."""

    lanes: int
    heads: int
    threads: int


@cache
def shape(width: int, itemsize: int, shared: int) -> Shape | None:
    """For lines of `width` values, and `shared` query heads a key head; None if the lines are too wide."""
    vectors = width * itemsize // _VECTOR
    lanes = min(_WARP, vectors & -vectors)
    values = width // lanes
    for heads in (n for n in range(8, 0, -1) if shared % n == 0 and n * values <= _REGISTERS):
        for warps in _WARPS:
            if warps * heads * (width + 2) * 4 + (heads + 2 * FEW) * width * itemsize <= _SHARED:
                return Shape(lanes, heads, warps * _WARP)
    return None


def splits(blocks: int, places: int) -> int:
    """How many blocks share the keys of a row that has room for so many, where there are `blocks` without that."""
    return power(min(-(-_BLOCKS // blocks), places // _SHARE, _MOST_SPLITS))


def power(most: int) -> int:
    """The highest power of two up to that, 1 at least: numbers of splits are few, and so are their counters."""
    return 1 << max(0, most.bit_length() - 1) if most > 0 else 1


@cache
def _no_frequencies() -> mx.array:
    none = mx.zeros((1,))
    mx.eval(none)
    return none


Rotating = tuple[tuple[str, int], ...]
"""The constants that a kernel's source names of a rotation."""


def rotating(rotation: Rotation | None) -> tuple[mx.array, Rotating]:
    """What a kernel is given of a rotation, or of none: its frequencies, and the constants."""
    if rotation is None:
        return _no_frequencies(), (("ROTATED", 0), ("TRADITIONAL", 0))
    return rotation.frequencies, (("ROTATED", rotation.dims), ("TRADITIONAL", int(rotation.traditional)))


def counters(shares: int, blocks: int) -> mx.array:
    """[shares, at least `blocks`] int32 zeros, for a launch in which so many blocks share keys.

    It is by the shape that the kernel knows: a constant would make a kernel of its own, to be compiled on the way.
    """
    return next(cuda_kernels.counters(shares, 1 << (blocks - 1).bit_length() if shares > 1 else 1))


def launch() -> Launch | None:
    """The kernel, if there is a device for it and the switch is not off."""
    return attend_and_write if cuda_kernels.usable(SWITCH) else None


def attend_and_write(call: Call) -> tuple[mx.array, Planes]:
    """What each query sees, [rows, heads, tokens, width], and the planes, which have the new keys and values then."""
    rows, heads, tokens, width = call.queries.shape
    dtype = call.queries.dtype
    groups = call.keys.shape[1]
    places = call.planes[0].shape[2]
    places = min(places, call.window or places)
    _, constants = rotating(call.rotation)
    window, ring = call.window or 0, call.ring or 0
    if (by_products := decode_kernel.shape(dtype, width, heads, groups, tokens, FEW)) is not None:
        blocks = by_products.blocks(rows, tokens)
        shares = decode_kernel.splits(blocks, places, by_products.warps)
        kernel = decode_kernel.kernel(by_products, window, ring, constants, call.scale, types(dtype))
        threads, lines = by_products.threads, by_products.lines
    else:
        way = shape(width, dtype.size, heads // groups)
        assert way is not None
        blocks = rows * (heads // way.heads) * tokens
        shares = splits(blocks, places)
        kernel = _kernel(call.scale, dtype, width, way, window, ring, constants)
        threads, lines = way.threads, way.heads
    new, sizes = (call.queries, call.keys, call.values), (blocks, shares, threads, lines)
    out = launched(kernel, call, new, sizes, (rows, tokens, heads, width), width)
    # In this order upstream's next transposition makes it contiguous.
    return out.swapaxes(1, 2), call.planes


def joined_launch(launch: Launch | None) -> JoinedLaunch | None:
    """What a layer that has this launch may call where nothing was taken apart yet: six views a layer less, each of
    which costs the host as much as half a launch."""
    return attend_joined if launch is attend_and_write else None


def applies_joined(dtype: mx.Dtype, tokens: int, heads: int, groups: int, width: int) -> bool:
    """Whether there is a kernel for it."""
    few = tokens <= FEW and heads % groups == 0
    return few and decode_kernel.shape(dtype, width, heads, groups, tokens, FEW) is not None


def attend_joined(call: JoinedCall) -> tuple[mx.array, Planes]:
    """As `attend_and_write`."""
    rows, tokens, _ = call.joined.shape
    dtype, places = call.joined.dtype, call.planes[0].shape[2]
    way = decode_kernel.shape(dtype, call.width, call.heads, call.groups, tokens, FEW)
    assert way is not None
    _, constants = rotating(call.rotation)
    blocks = way.blocks(rows, tokens)
    kernel = decode_kernel.kernel(way, 0, 0, constants, call.scale, joined_types(dtype))
    sizes = blocks, decode_kernel.splits(blocks, places, way.warps), way.threads, way.lines
    attended = rows, tokens, call.heads * call.width
    return launched(kernel, call, (call.joined,), sizes, attended, call.width), call.planes


def launched(
    kernel: Kernel,
    held: Held,
    new: Sequence[mx.array],
    sizes: tuple[int, int, int, int],
    shape: tuple[int, ...],
    width: int,
) -> mx.array:
    """What a kernel for few tokens makes of `new` arrays, of a `shape`, with heads of `width`; `sizes` are its blocks
    where nobody shares keys, how many do, a block's threads, and its queries."""
    blocks, shares, threads, lines = sizes
    frequencies, _ = rotating(held.rotation)
    after = new[0] if held.after is None else held.after
    out: mx.array = kernel.launch(
        inputs=[*new, *held.planes, held.starts, after, counters(shares, blocks), frequencies],
        grid=(blocks * shares * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, partial(blocks, shares, lines, width)],
        output_dtypes=[new[0].dtype, mx.float32],
    )[0]
    return out


def partial(blocks: int, shares: int, heads: int, width: int) -> tuple[int, ...]:
    """The shape of what blocks leave for the last of those that share keys."""
    return (blocks, shares, heads, width + 2) if shares > 1 else (1,)


@cache
def types(dtype: mx.Dtype) -> decode_kernel.Types:
    """Of the arrays that a launch takes, in their order."""
    others = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
    return tuple((name, others.get(name, dtype)) for name in INPUTS)


@cache
def joined_types(dtype: mx.Dtype) -> decode_kernel.Types:
    """The same where queries, keys and values are one."""
    return (("joined", dtype), *types(dtype)[3:])


def header(scale: float) -> str:
    """What comes before the kernel: scores are powers of two."""
    return f"{HEADER}constexpr float SCALE = {scale * math.log2(math.e)!r}f;\n"


@cache
def _kernel(
    scale: float, dtype: mx.Dtype, width: int, way: Shape, window: int, ring: int, rotating: Rotating
) -> Kernel:
    return Kernel(
        name="attend_and_write",
        inputs=dict(types(dtype)),
        outputs={"out": dtype, "partial": mx.float32},
        source=cuda_kernels.terse(SOURCE),
        header=header(scale),
        # A copy of the planes would be written in their place. Strides are the kernel's business.
        ensure_row_contiguous=False,
        template=[
            ("T", dtype),
            *(("D", width), ("LANES", way.lanes), ("HEADS", way.heads), ("THREADS", way.threads)),
            *(("FEW", FEW), ("WINDOW", window), ("RING", ring)),
            *rotating,
        ],
    )
