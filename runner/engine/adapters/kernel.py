"""Every row's low-rank change to one layer's product, and what follows that, in one launch on CUDA.

While rows decode, a step takes as long as its launches do: two products and a sum for each layer would double it. Here
a block of threads takes one token and up to 2,048 outputs: first the rank's few inner products of the token with its
own adapter (a warp for each), then the outputs. Batches of several adapters need no sorting, since each block finds
its adapter by the row. The idea of a product that gathers its own weights is Punica's (Chen et al., arXiv:2310.18547).

The sum with what a block began with, or an MLP's gate, are part of it: to the bit what they are apart.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.adapters.stack import Stack
from runner.engine.changed_source import UNPACK
from runner.engine.cuda_kernels import KINDS, Kernel
from runner.engine.product_source import SWIGLU

SWITCH: Final = "MLX_RUN_ADAPTER_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

MOST_TOKENS: Final = 8
"""Tokens of a row in one call up to which the kernel is used: longer calls are worth real products."""

_MOST_RANK: Final = 512
_THREADS: Final = 512
_VECTOR: Final = 8
_TILE: Final = 2048

_SOURCE: Final = (
    """
    const int K = x_shape[2], O = y_shape[2], rows = x_shape[0] * x_shape[1];
"""
    + UNPACK
    + """
    const int N = O / PARTS, tiles = (N + TILE - 1) / TILE;
    const int n = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE, o = first + threadIdx.x * 8;
    const int slot = slots[n / each];
    const int* const span = spans + slot * 32;
    const int last = min(first + TILE, N) - 1 + (PARTS - 1) * N;
    int p = 0;
    while (span[p * 3] <= first) ++p;
    const int low = span[p * 3 + 1];
    while (span[p * 3] <= last) ++p;
    const int high = span[p * 3 + 2];

    // A warp takes a rank, or, where there are more warps than ranks, an equal part of its product.
    constexpr int WARPS = THREADS / 32;
    __shared__ float inner[MOST_RANK], partial[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ranks = high - low;
    const int splits = ranks > 0 && ranks < WARPS ? WARPS / ranks : 1;
    for (int from = 0; from < ranks * splits; from += WARPS) {
        const int item = from + warp, r = low + item / splits, split = item % splits;
        const T* row = down + (size_t(slot) * R + r) * K;
        const T* token = x + size_t(n) * K;
        float sum = 0.0f;
        if (r < high) {
            #pragma unroll 4
            for (int k = (split * 32 + lane) * 8; k < K; k += splits * 256) {
                const uint4 left = *reinterpret_cast<const uint4*>(token + k);
                const uint4 right = *reinterpret_cast<const uint4*>(row + k);
                const T* l = reinterpret_cast<const T*>(&left);
                const T* m = reinterpret_cast<const T*>(&right);
                #pragma unroll
                for (int i = 0; i < 8; ++i) sum += float(l[i]) * float(m[i]);
            }
        }
        #pragma unroll
        for (int width = 16; width > 0; width >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, width);
        if (lane == 0 && r < high) {
            if (splits == 1) inner[r] = sum; else partial[item] = sum;
        }
    }
    __syncthreads();
    if (splits > 1) {
        if (threadIdx.x < ranks) {
            float sum = 0.0f;
            for (int split = 0; split < splits; ++split) sum += partial[threadIdx.x * splits + split];
            inner[low + threadIdx.x] = sum;
        }
        __syncthreads();
    }
    if (threadIdx.x >= TILE / 8 || o >= N) return;

    T changed[PARTS][8];
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int column = o + part * N;
        const uint4 base = *reinterpret_cast<const uint4*>(y + size_t(n) * O + column);
        const T* yv = reinterpret_cast<const T*>(&base);
        float total[8];
        #pragma unroll
        for (int i = 0; i < 8; ++i) total[i] = float(yv[i]);
        p = 0;
        while (span[p * 3] <= column) ++p;
        #pragma unroll 4
        for (int r = span[p * 3 + 1]; r < span[p * 3 + 2]; ++r) {
            const uint4 values = *reinterpret_cast<const uint4*>(up + (size_t(slot) * R + r) * O + column);
            const T* v = reinterpret_cast<const T*>(&values);
            const float h = inner[r];
            #pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += h * float(v[i]);
        }
        #pragma unroll
        for (int i = 0; i < 8; ++i) changed[part][i] = T(total[i]);
    }
    const size_t at = size_t(n) * N + o;
    uint4 result;
    T* written = reinterpret_cast<T*>(&result);
    FOLLOW
    *reinterpret_cast<uint4*>(out + at) = result;
"""
)

_FOLLOW: Final = {
    "plain": """
    uint4 more = {0, 0, 0, 0};
    if (added_ndim > 1) more = *reinterpret_cast<const uint4*>(added + at);
    const T* a = reinterpret_cast<const T*>(&more);
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        written[i] = added_ndim > 1 ? T(float(a[i]) + float(changed[0][i])) : changed[0][i];
    }
""",
    "swiglu": """
    #pragma unroll
    for (int i = 0; i < 8; ++i) written[i] = swiglu(changed[0][i], changed[1][i]);
""",
}
"""What becomes of the changed product. A sum's other part has one axis where there is none."""


def applies(x: mx.array, stack: Stack) -> bool:
    """Whether the kernel can take a call: a few 16-bit tokens a row, in whole vectors, on CUDA, without DoRA."""
    return cuda_kernels.usable(SWITCH) and fits(x, stack)


def fits(x: mx.array, stack: Stack) -> bool:
    """The same of any device."""
    down = stack.down
    return (
        stack.packed is not None
        and x.ndim == 3
        and x.shape[1] <= MOST_TOKENS
        and x.dtype == down.dtype
        and down.dtype in KINDS
        and down.shape[1] <= _MOST_RANK
        and all(end % _VECTOR == 0 for end, _, _ in stack.spans[0])
        and down.shape[2] % _VECTOR == 0
    )


def add_changes(
    x: mx.array, y: mx.array, stack: Stack, board: mx.array, added: mx.array | None = None, epilogue: str = "plain"
) -> mx.array:
    """y + x · a · b, each row with the matrices of its slot, plus what is `added`; for "swiglu", a gate and an MLP's
    input made one.

    x is [rows, tokens, in] and y [rows, tokens, out], of one type, `board` one of the rows'. The result is
    [rows, tokens, out], or half as wide for "swiglu".
    """
    count, tokens, outputs = y.shape
    outputs //= parts(epilogue)
    rest = [] if epilogue == "swiglu" else [_nothing(x.dtype) if added is None else added]
    result: mx.array = _kernel(x.dtype, epilogue).launch(
        inputs=[x, y, *rest, stack.packed, board],
        grid=(count * tokens * -(-outputs // _TILE) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(count, tokens, outputs)],
        output_dtypes=[x.dtype],
    )[0]
    return result


def prepare(stack: Stack) -> None:
    """Begin to compile, for such changes."""
    if cuda_kernels.usable(SWITCH) and stack.packed is not None:
        for epilogue in _FOLLOW:
            _kernel(stack.packed.dtype, epilogue)


def parts(epilogue: str) -> int:
    """Layers whose outputs follow each other in a product."""
    return 2 if epilogue == "swiglu" else 1


def source(epilogue: str) -> str:
    """The kernel's text."""
    return cuda_kernels.terse(cuda_kernels.filled(_SOURCE, {"FOLLOW": _FOLLOW[epilogue]}))


def constants(dtype: mx.Dtype, epilogue: str, threads: int = _THREADS, tile: int = _TILE) -> str:
    """What the source does not say. A block computes up to `tile` outputs, at most eight a thread."""
    return (
        f"using T = {KINDS[dtype][0]};\nconstexpr int THREADS = {threads}, TILE = {tile};\n"
        f"constexpr int MOST_RANK = {_MOST_RANK}, PARTS = {parts(epilogue)};\n"
    )


def header(dtype: mx.Dtype, epilogue: str) -> str:
    """What comes before it."""
    return constants(dtype, epilogue) + (SWIGLU if epilogue == "swiglu" else "")


def inputs_of(epilogue: str) -> list[str]:
    """What the source calls a call's arrays."""
    return ["x", "y", *([] if epilogue == "swiglu" else ["added"]), "changes", "board"]


@cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    none = mx.zeros((1,), dtype)
    mx.eval(none)
    return none


@cache
def _kernel(dtype: mx.Dtype, epilogue: str) -> Kernel:
    return Kernel(
        name=f"changes_{epilogue}_{KINDS[dtype][1]}",
        inputs={name: mx.int32 if name == "board" else dtype for name in inputs_of(epilogue)},
        outputs={"out": dtype},
        source=source(epilogue),
        header=header(dtype, epilogue),
    )
