"""Prints which kernels MLX has compiled for graphs of calls of these widths, by what they compute.

    python -m tests.engine.graph_kernels MODEL START WIDTH [WIDTH …]

In a process of its own: MLX keeps what it has compiled for the CPU in the folder for temporary files, and reads once
where that is. Names say what a kernel computes, constants included, as for a GPU, where each takes seconds to compile.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from runner.engine import traced
from runner.engine.kv import attention_kernel, quantised_kernel
from runner.engine.kv.calls import Call, Planes
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall
from runner.engine.loader import load
from tests.engine.kv.launches import packed_separately, separately


def launch(call: Call) -> tuple[mx.array, Planes]:
    """What waits for all that it is given, and has no kernel."""
    return mx.depends([call.queries], [call.starts])[0], call.planes


def packed_launch(call: PackedCall) -> tuple[mx.array, list[mx.array]]:
    """The same of packed keys and values."""
    return mx.depends([call.queries], [call.starts])[0], list(call.planes)


def main() -> None:
    """Two rows are called with each width until its graph is kept: before the threshold, and on both sides of it."""
    model, start, *widths = sys.argv[1:]
    attention_kernel.launch = lambda: separately
    quantised_kernel.launch = lambda: packed_separately
    loaded = load(Path(model), quantisation=Quantisation(8, 32, int(start)))
    loaded.layout.launch, loaded.layout.packed_launch = launch, packed_launch
    call = traced.TracedCalls(loaded.model)
    for width in map(int, widths):
        for lengths in ((5, 7), (10, int(start) + 5)):
            caches, other = loaded.layout.new(), loaded.layout.new()
            for rows, length in zip((caches, other), lengths, strict=True):
                mx.eval(rows.call(loaded.model, mx.zeros((1, length), dtype=mx.uint32)), rows.arrays)
            caches.join(other)
            for _ in range(5):
                mx.eval(call(caches, mx.zeros((2, width), dtype=mx.uint32)), caches.arrays)
                caches.dispatched()
    names = {path.stem for path in Path(tempfile.gettempdir()).glob("mlx/*/cpu/*.cpp")}
    print(*sorted({name.split("_contiguous")[0].split("_strided")[0] for name in names}), sep="\n")


if __name__ == "__main__":
    main()
