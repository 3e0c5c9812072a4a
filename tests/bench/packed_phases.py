"""What the time of a block goes to that attends to packed keys, or to plain ones: `packed_launch.py --phases`.

The kernels' sources, with the clock read between their parts by a block's first thread. A launch is one of several over
planes that no cache holds, of which the last counts. Nanoseconds by the device's own timer from the first block's
beginning to the last's end; thousands of cycles of a block's parts, medians and maxima of all blocks; and how many
blocks a multiprocessor has had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine.cuda_kernels import Kernel
from runner.engine.kv import attention_kernel, decode_kernel, decode_source, quantised_kernel, quantised_source
from runner.engine.kv.masks import FEW
from runner.engine.kv.quantised import Quantisation
from tests.bench.packed_checks import Heads, drawn, planes_of, turning
from tests.bench.record import progress

PARTS = ("place and fetch", "new", "queries", "keys", "block", "splits")
"""What ends where the clock is read."""

FIELDS = 10
"""Numbers of a block: the clock at its beginning and after each part, the timer at its beginning and end, and where it
ran. The last part is of the last block alone."""

LAYERS = 6

_READ = """
    auto stamp = [&](int i) {
        if (threadIdx.x == 0) times[blockIdx.x * 10 + i] = clock64();
    };
    auto timer = [&](int i) {
        unsigned long long now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (threadIdx.x == 0) times[blockIdx.x * 10 + i] = now;
    };
    if (threadIdx.x == 0) {
        unsigned where;
        asm volatile("mov.u32 %0, %smid;" : "=r"(where));
        times[blockIdx.x * 10 + 6] = 0;
        times[blockIdx.x * 10 + 9] = where;
    }
    timer(7);
    stamp(0);
"""
_LAST = "    // The block that comes last"


def stamped(parts: Sequence[str], merge: str) -> str:
    """The source of such parts, with the clock read after each."""
    before, found, after = merge.partition(_LAST)
    assert found
    text = _READ + "".join(f"{part}\n    stamp({i + 1});\n" for i, part in enumerate(parts))
    return f"{text}{before}\n    stamp(5);\n    timer(8);\n{found}{after}\n    stamp(6);\n    timer(8);\n"


def packed(heads: Heads, rows: int, context: int, bits: int) -> np.ndarray[Any, Any]:
    """Numbers of each block of a launch, [blocks, FIELDS]."""
    queries, groups, width = heads
    places = -(-(context + 8) // 256) * 256
    way = quantised_kernel.shape(width, 2, (bits, 64), queries, groups, 1)
    assert way is not None
    rotation = attention_kernel.rotating(turning(width))
    constants = quantised_kernel.constants(width, bits, 64, 0, way)
    parts = [quantised_source._START + quantised_source._COPY, quantised_source.NEW]
    parts += [quantised_source.QUERIES + quantised_source.ATTEND, quantised_source._LOOP]
    kernel = Kernel(
        name=f"phases_{bits}",
        inputs=quantised_kernel.types(mx.bfloat16),
        outputs={"out": mx.bfloat16, "partial": mx.float32, "times": mx.uint64},
        source=stamped(parts, quantised_source.MERGE),
        header=quantised_kernel.header(width**-0.5),
        ensure_row_contiguous=False,
        shared_memory=way.shared_memory,
        template=[("T", mx.bfloat16), *constants, *rotation[1]],
    )
    blocks = way.blocks(rows, 1)
    shares = quantised_kernel.splits(way, blocks, places)
    layers = [planes_of(Quantisation(bits, 64), rows, heads, places, mx.bfloat16) for _ in range(LAYERS)]
    return run(kernel, heads, (rows, context), layers, rotation[0], (blocks, shares, way.warps * 32, way.lines))


def plain(heads: Heads, rows: int, context: int) -> np.ndarray[Any, Any]:
    """The same in 16 bits."""
    queries, groups, width = heads
    places = -(-(context + 8) // 256) * 256
    way = decode_kernel.shape(mx.bfloat16, width, queries, groups, 1, FEW)
    assert way is not None
    rotation = attention_kernel.rotating(turning(width))
    before, loop, after = decode_source._ATTEND.partition("    for (int round = 0; tile_of(round) < tiles")
    parts = [decode_source._PLACE + decode_source._FETCH, decode_source._NEW, before, loop + after]
    kernel = Kernel(
        name="phases_16",
        inputs=dict(attention_kernel.types(mx.bfloat16)),
        outputs={"out": mx.bfloat16, "partial": mx.float32, "times": mx.uint64},
        source=stamped(parts, decode_source._MERGE),
        header=decode_kernel.whole_header(mx.bfloat16, decode_kernel.constants(way, 0, 0, rotation[1]), width**-0.5),
        ensure_row_contiguous=False,
        shared_memory=way.shared_memory,
    )
    blocks = way.blocks(rows, 1)
    shares = decode_kernel.splits(blocks, places, way.warps)
    shape = rows, groups, places, width
    layers = [[mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)] for _ in range(LAYERS)]
    mx.eval(layers)
    return run(kernel, heads, (rows, context), layers, rotation[0], (blocks, shares, way.threads, way.lines))


def run(
    kernel: Kernel,
    heads: Heads,
    case: tuple[int, int],
    layers: Sequence[Sequence[mx.array]],
    frequencies: mx.array,
    sizes: tuple[int, int, int, int],
) -> np.ndarray[Any, Any]:
    """Of the last of so many launches; `sizes` are blocks, how many share keys, threads, and a block's queries."""
    blocks, shares, threads, lines = sizes
    rows, context = case
    new, at = drawn(rows, 1, heads, mx.bfloat16), mx.array([context] * rows, dtype=mx.int32)
    after, times = new[0], mx.zeros((1,))
    for planes in [*layers, *layers]:
        after, _, times = kernel.launch(
            inputs=[*new, *planes, at, after, attention_kernel.counters(shares, blocks), frequencies],
            grid=(blocks * shares * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[
                (rows, 1, heads[0], heads[2]),
                attention_kernel.partial(blocks, shares, lines, heads[2]),
                (blocks * shares, FIELDS),
            ],
            output_dtypes=[mx.bfloat16, mx.float32, mx.uint64],
        )
        mx.eval(after, times)
    return np.array(times).astype(np.int64)


def show(heads: Heads, case: tuple[int, int], bits: Sequence[int]) -> None:
    """A line a format."""
    for n in (16, *bits):
        found = plain(heads, *case) if n == 16 else packed(heads, *case, n)
        last = found[:, 6] > 0
        spans = np.diff(found[:, :6], axis=1) / 1e3
        listed = [f"{PARTS[i]} {np.median(spans[:, i]):.1f} {spans[:, i].max():.1f}" for i in range(5)]
        if last.any():
            splits = (found[last, 6] - found[last, 5]) / 1e3
            listed.append(f"{PARTS[5]} {np.median(splits):.1f} {splits.max():.1f}")
        began = found[:, 7] - found[:, 7].min()
        _, each = np.unique(found[:, 9], return_counts=True)
        whole = found[:, 8].max() - found[:, 7].min()
        progress(
            f"{case[0]} rows of {case[1]}, {n} bits: {whole} ns, blocks begin by {began.max()}; "
            f"{'; '.join(listed)}; {len(found)} blocks, {each.min()} to {each.max()} each of {len(each)}"
        )
