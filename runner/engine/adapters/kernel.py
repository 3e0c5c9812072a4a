"""Every row's low-rank change to one layer, in one launch on CUDA.

While rows decode, a step takes as long as its launches do: two products and a sum for each layer would double it. Here
a block of threads takes one token and up to 2,048 outputs: first the rank's few inner products of the token with its
own adapter (a warp for each), then the outputs. Batches of several adapters need no sorting, since each block finds
its adapter by the row. The idea of a product that gathers its own weights is Punica's (Chen et al., arXiv:2310.18547).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import Kernel

SWITCH: Final = "MLX_RUN_ADAPTER_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

MOST_TOKENS: Final = 8
"""Tokens of a row in one call up to which the kernel is used: longer calls are worth real products."""

_MOST_RANK: Final = 512
_THREADS: Final = 512
_VECTOR: Final = 8
_TILE: Final = 2048

_SOURCE: Final = """
    const int K = a_shape[2], R = a_shape[1], O = b_shape[2], P = spans_shape[1];
    const int n = blockIdx.y;
    const int first = blockIdx.x * TILE;
    const int o = first + threadIdx.x * 8;
    const int slot = slots[n / TOKENS];
    const size_t at = size_t(n) * O + o;
    if (slot == 0) {
        if (threadIdx.x >= TILE / 8 || o >= O) return;
        *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(y + at);
        return;
    }
    // A span (Stack.spans) is where a part's outputs end, and the ranks [low, high) that reach them.
    const int* span = spans + slot * P * 3;
    const int last = min(first + TILE, O) - 1;
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
    for (int item = warp; item < ranks * splits; item += WARPS) {
        const int r = low + item / splits, split = item % splits;
        const T* row = a + (size_t(slot) * R + r) * K;
        const T* token = x + size_t(n) * K;
        float sum = 0.0f;
        #pragma unroll 4
        for (int k = (split * 32 + lane) * 8; k < K; k += splits * 256) {
            const uint4 left = *reinterpret_cast<const uint4*>(token + k);
            const uint4 right = *reinterpret_cast<const uint4*>(row + k);
            const T* l = reinterpret_cast<const T*>(&left);
            const T* m = reinterpret_cast<const T*>(&right);
            #pragma unroll
            for (int i = 0; i < 8; ++i) sum += float(l[i]) * float(m[i]);
        }
        #pragma unroll
        for (int width = 16; width > 0; width >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, width);
        if (lane == 0) {
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
    if (threadIdx.x >= TILE / 8 || o >= O) return;

    p = 0;
    while (span[p * 3] <= o) ++p;
    const uint4 base = *reinterpret_cast<const uint4*>(y + at);
    const T* yv = reinterpret_cast<const T*>(&base);
    float total[8];
    #pragma unroll
    for (int i = 0; i < 8; ++i) total[i] = float(yv[i]);
    #pragma unroll 4
    for (int r = span[p * 3 + 1]; r < span[p * 3 + 2]; ++r) {
        const uint4 values = *reinterpret_cast<const uint4*>(b + (size_t(slot) * R + r) * O + o);
        const T* v = reinterpret_cast<const T*>(&values);
        const float h = inner[r];
        #pragma unroll
        for (int i = 0; i < 8; ++i) total[i] += h * float(v[i]);
    }
    uint4 result;
    T* written = reinterpret_cast<T*>(&result);
    #pragma unroll
    for (int i = 0; i < 8; ++i) written[i] = T(total[i]);
    *reinterpret_cast<uint4*>(out + at) = result;
"""


def applies(x: mx.array, stack: Stack) -> bool:
    """Whether the kernel can take a call: a few 16-bit tokens a row, in whole vectors, on CUDA, without DoRA."""
    down, b = stack.down, stack.b
    return (
        cuda_kernels.usable(SWITCH)
        and x.ndim == 3
        and x.shape[1] <= MOST_TOKENS
        and x.dtype == down.dtype
        and down.dtype in (mx.bfloat16, mx.float16)
        and down.shape[1] <= _MOST_RANK
        and stack.magnitude is None
        and all(end % _VECTOR == 0 for end, _, _ in stack.spans[0])
        and down.shape[2] % _VECTOR == 0
        and b.ndim == 3
    )


def add_changes(x: mx.array, y: mx.array, stack: Stack, slots: mx.array) -> mx.array:
    """y + x · a · b, each row with the matrices of its slot.

    x is [rows, tokens, in], y [rows, tokens, out], `slots` [rows] int32.
    """
    tokens = x.shape[0] * x.shape[1]
    tiles = -(-y.shape[-1] // _TILE)
    (out,) = _kernel()(
        inputs=[x, y, stack.down, stack.b, stack.span_array, slots],
        template=[("T", x.dtype), ("TOKENS", x.shape[1])],
        grid=(tiles * _THREADS, tokens, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[y.dtype],
    )
    return out


@cache
def _kernel() -> Kernel:
    return Kernel(
        name="low_rank_changes",
        input_names=["x", "y", "a", "b", "spans", "slots"],
        output_names=["out"],
        source=cuda_kernels.terse(_SOURCE),
        header=(
            f"constexpr int THREADS = {_THREADS};\nconstexpr int TILE = {_TILE};\n"
            f"constexpr int MOST_RANK = {_MOST_RANK};\n"
        ),
    )
