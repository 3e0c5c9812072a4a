"""A draw for every row in one launch on CUDA: filters, noise and choice.

In separate operations a step of 128 rows and 128,000 tokens spends most of its sampling in a sort of all logits,
whose result is one threshold a row. Here a block of threads finds a row's thresholds by histograms, and makes noise for
the tokens that are left only (`draw_source.py`). Where rows are few, several blocks share a row's noise.

Clusters of blocks could share the histograms as well. But MLX uses a graph again for kernels of other names, and CUDA
does not update one correctly where clusters differ, which MLX does not know of a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import PROCESSORS, Kernel
from runner.engine.draw_source import DEVICE, HEADER, SOURCE

SWITCH: Final = "MLX_RUN_DRAW_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

THREADS: Final = 1024
"""Of a block, which has a multiprocessor to itself."""

_MOST_SPLITS: Final = 8
_AT_ONCE: Final = 8

INPUTS: Final = ("logits", "settings", "keys", "positions", "counters")
"""What the source calls a launch's arrays."""

_LEAST_SHIFTS: Final = {mx.bfloat16: 16, mx.float16: 12, mx.float32: 0}
"""Below this bit all ranks of a type are alike."""


def applies(logits: mx.array) -> bool:
    """Whether the kernel can take a call."""
    return cuda_kernels.usable(SWITCH) and logits.dtype in _LEAST_SHIFTS


def draw_tokens(logits: mx.array, settings: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
    """Tokens [B, T] for logits [B, T, V].

    `settings` [B, 4] of float32 are 1 / temperature (0 is greedy), top_p, the logarithm of min_p and top_k (V for
    none); `keys` [B, 1, 2] of uint32 are the rows', to the second of which the token's position is added: `positions`
    [B, 1] of uint32 for the first of T.
    """
    rows, count, _ = logits.shape
    shares = splits(rows * count)
    tokens: mx.array = _kernel(logits.dtype).launch(
        inputs=[logits, settings, keys, positions, counters(shares)],
        grid=(rows * count * shares * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, count), (rows * count, shares, 2) if shares > 1 else (1,)],
        output_dtypes=[mx.uint32, mx.uint32],
    )[0]
    return tokens


def splits(rows: int) -> int:
    """How many blocks share a row's noise at most."""
    return max(1, min(_MOST_SPLITS, PROCESSORS // rows))


def counters(shares: int) -> mx.array:
    """int32 zeros for rows that `shares` blocks share; a launch leaves them so, and has the number from the shape."""
    return next(_counters()[shares])


@cache
def _counters() -> dict[int, Iterator[mx.array]]:
    # Draws that run at once do not have the same ones.
    shapes = {shares: (shares, PROCESSORS // shares) for shares in range(1, _MOST_SPLITS + 1)}
    arrays = {shares: [mx.zeros(shape, mx.int32) for _ in range(_AT_ONCE)] for shares, shape in shapes.items()}
    mx.eval(arrays)
    return {shares: cycle(some) for shares, some in arrays.items()}


def prepare(dtype: mx.Dtype) -> None:
    """Begin to compile the kernel for such logits, where it can be used, and have at hand what launches share."""
    if cuda_kernels.usable(SWITCH) and dtype in _LEAST_SHIFTS:
        _kernel(dtype)
        _counters()


def header() -> str:
    """What comes before the kernel."""
    return f"constexpr int THREADS = {THREADS};\n{DEVICE}{HEADER}"


@cache
def _kernel(dtype: mx.Dtype) -> Kernel:
    return Kernel(
        name="draw_tokens",
        inputs={
            "logits": dtype,
            "settings": mx.float32,
            "keys": mx.uint32,
            "positions": mx.uint32,
            "counters": mx.int32,
        },
        outputs={"out": mx.uint32, "parts": mx.uint32},
        source=cuda_kernels.terse(SOURCE),
        header=header(),
        template=[("T", dtype), ("LEAST_SHIFT", _LEAST_SHIFTS[dtype])],
    )
