"""What is left of rows' low-rank changes where their inner products are there, in one launch on CUDA.

The product of 33 to 128 tokens computes those as if they were more of its outputs (`wide_product_kernel.py`). Here a
thread takes one vector of a token's outputs: it has its product, its slot's few ranks and what is to be added on their
way at once, and writes what `kernel.add_changes` would.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import KINDS, Kernel
from runner.engine.product_source import SWIGLU

MOST_RANK: Final = 512
"""Of all parts of a layer together."""

_THREADS: Final = 128
_VECTOR: Final = 8

_AT_ONCE: Final = {"plain": 8, "swiglu": 4}
"""Ranks of a part whose values are on their way together."""

_SOURCE: Final = """
    const int O = y_shape[y_ndim - 1], N = O / PARTS, pieces = inner_shape[0], rows = inner_shape[1];
    const int S = inner_shape[2], R = inner_shape[3], tiles = (N / 8 + THREADS - 1) / THREADS;
    const int n = blockIdx.x / tiles, mine = (blockIdx.x % tiles * THREADS + threadIdx.x) * 8;
    const int o = min(mine, N - 8), slot = board[32 + n / (rows / board_shape[0])];
    const size_t at = size_t(n) * N + o;
    uint4 product[PARTS];
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        product[part] = *reinterpret_cast<const uint4*>(y + size_t(n) * O + o + part * N);
    }
    BEFORE

    float total[PARTS][8];
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        #pragma unroll
        for (int i = 0; i < 8; ++i) total[part][i] = float(reinterpret_cast<const T*>(&product[part])[i]);
    }
    if (slot > 0) {
        // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
        const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S - slot) * R * O + o;
        const int* const spans = reinterpret_cast<const int*>(changes) + slot * 32;
        int low[PARTS], high[PARTS], most = 0;
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int* span = spans;
            int end = span[0], from = span[1], to = span[2];
            #pragma unroll 1
            while (end <= o + part * N) span += 3, end = span[0], from = span[1], to = span[2];
            low[part] = from, high[part] = to, most = max(most, to - from);
        }
        uint4 values[PARTS][AT_ONCE];
        auto look = [&](int i) {
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                #pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const int rank = low[part] + i + j;
                    if (rank < high[part]) {
                        values[part][j] = *reinterpret_cast<const uint4*>(up + size_t(rank) * O + part * N);
                    }
                }
            }
        };
        look(0);
        __shared__ float sums[MOST_RANK];
        for (int r = threadIdx.x; r < R; r += THREADS) {
            const float* const its = inner + (size_t(n) * S + slot) * R + r;
            float sum = 0.0f;
            #pragma unroll 4
            for (int piece = 0; piece < pieces; ++piece) sum += its[size_t(piece) * rows * S * R];
            sums[r] = sum;
        }
        __syncthreads();
        for (int i = 0; i < most; i += AT_ONCE) {
            if (i > 0) look(i);
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                #pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const int rank = low[part] + i + j;
                    if (rank >= high[part]) continue;
                    const T* const v = reinterpret_cast<const T*>(&values[part][j]);
                    #pragma unroll
                    for (int e = 0; e < 8; ++e) total[part][e] += sums[rank] * float(v[e]);
                }
            }
        }
    }
    if (mine >= N) return;
    uint4 result;
    T* const written = reinterpret_cast<T*>(&result);
    #pragma unroll
    for (int i = 0; i < 8; ++i) FOLLOW
    *reinterpret_cast<uint4*>(out + at) = result;
"""

_PLACES: Final = {
    "plain": {
        "BEFORE": """
    uint4 more = {0, 0, 0, 0};
    if (added_ndim > 1) more = *reinterpret_cast<const uint4*>(added + at);
""",
        "FOLLOW": """{
        const T changed = T(total[0][i]);
        written[i] = added_ndim > 1 ? T(float(reinterpret_cast<const T*>(&more)[i]) + float(changed)) : changed;
    }""",
    },
    "swiglu": {"BEFORE": "", "FOLLOW": "written[i] = swiglu(T(total[0][i]), T(total[1][i]));"},
}
"""What becomes of the changed product. A sum's other part has one axis where there is none."""


def fits(stack: Stack) -> bool:
    """Whether there is a kernel for such changes."""
    return (
        stack.packed is not None
        and stack.down.dtype in KINDS
        and stack.down.shape[1] <= MOST_RANK
        and all(end % _VECTOR == 0 for end, _, _ in stack.spans[0])
    )


def expand(
    y: mx.array, inner: mx.array, stack: Stack, board: mx.array, added: mx.array, epilogue: str = "plain"
) -> mx.array:
    """y plus each row's change, plus what is `added`, unless that has one axis; for "swiglu", which looks at no
    `added`, a gate and an MLP's input made one.

    y is [rows, tokens, out], or [rows · tokens, out], and `inner` [pieces, rows · tokens, slots, ranks] the tokens'
    inner products with `down` of all slots, in float32; `board` one of the rows'. The result is of y's shape, or half
    as wide for "swiglu".
    """
    outputs = y.shape[-1] // parts(epilogue)
    rest = [] if epilogue == "swiglu" else [added]
    result: mx.array = kernel(y.dtype, epilogue).launch(
        inputs=[y, inner, *rest, stack.packed, board],
        grid=(inner.shape[1] * blocks(outputs) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(*y.shape[:-1], outputs)],
        output_dtypes=[y.dtype],
    )[0]
    return result


def blocks(outputs: int, threads: int = _THREADS) -> int:
    """Of a token."""
    return -(-outputs // (_VECTOR * threads))


def source(epilogue: str) -> str:
    """The kernel's text."""
    text = _SOURCE
    for place, what in _PLACES[epilogue].items():
        text = text.replace(place, what)
    return cuda_kernels.terse(text)


def constants(dtype: mx.Dtype, epilogue: str, threads: int = _THREADS) -> str:
    """What the source does not say."""
    return (
        f"using T = {KINDS[dtype][0]};\nconstexpr int THREADS = {threads}, PARTS = {parts(epilogue)};\n"
        f"constexpr int MOST_RANK = {MOST_RANK}, AT_ONCE = {_AT_ONCE[epilogue]};\n"
    )


def header(dtype: mx.Dtype, epilogue: str) -> str:
    """What comes before it."""
    return constants(dtype, epilogue) + (SWIGLU if epilogue == "swiglu" else "")


def inputs_of(epilogue: str, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """What the source calls a call's arrays, and their types."""
    rest = {} if epilogue == "swiglu" else {"added": dtype}
    return {"y": dtype, "inner": mx.float32, **rest, "changes": dtype, "board": mx.int32}


@cache
def kernel(dtype: mx.Dtype, epilogue: str) -> Kernel:
    """Begins to be compiled when it is first wanted."""
    return Kernel(
        name=f"expand_{epilogue}_{KINDS[dtype][1]}",
        inputs=inputs_of(epilogue, dtype),
        outputs={"out": dtype},
        source=source(epilogue),
        header=header(dtype, epilogue),
    )
