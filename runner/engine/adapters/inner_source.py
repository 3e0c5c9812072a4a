"""The source of `inner_kernel`, in CUDA.

A block has up to TILES · 8 tokens of one row, and 16 ranks of the row's slot. Its WARPS share K: each takes every
WARPS-th chunk of 64 values, and their sums are added in the order of the warps. So the order of a sum depends on K and
WARPS only, and a token's inner products are the same bits whatever is beside it.

Ranks are the tensor cores' 16 × 16 operand, tokens their 16 × 8 one, read as `product_source` reads them. Of a row
without a change nothing is written, which `expand` does not look at.

T, WARPS, TILES and PARTS are constants; `tensor_cores` has what only a GPU can do.
"""

from __future__ import annotations

from typing import Final

BODY: Final = """
    const int tokens = x_shape[1], K = x_shape[2], O = w_shape[0], S = changes_shape[0];
    const int R = (changes_shape[1] - 64) / (K + O), shares = (R + 15) / 16;
    const int tiles = (tokens + TILES * 8 - 1) / (TILES * 8);
    const int tile = blockIdx.x / shares, row = tile / tiles, begin = tile % tiles * TILES * 8;
    const int lowest = blockIdx.x % shares * 16, slot = board[32 + row], count = min(tokens - begin, TILES * 8);
    if (slot == 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // What is not there is the last one again; nobody looks at what it gives.
    const T* const down = changes + size_t(S) * 64 + size_t(slot) * R * K + t * 8;
    const T* const low = down + size_t(min(lowest + g, R - 1)) * K;
    const T* const high = down + size_t(min(lowest + g + 8, R - 1)) * K;
    const T* from[TILES];
    float sum[TILES][4];
    #pragma unroll
    for (int i = 0; i < TILES; ++i) {
        from[i] = x + (size_t(row) * tokens + begin + min(i * 8 + g, count - 1)) * K + t * 8;
        sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
    }
    #pragma unroll 2
    for (int k = warp * 64; k < K; k += WARPS * 64) {
        uint4 a[2][2], b[2][TILES];
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            a[h][0] = load(low + k + h * 32, true), a[h][1] = load(high + k + h * 32, true);
            #pragma unroll
            for (int i = 0; i < TILES; ++i) b[h][i] = load(from[i] + k + h * 32, true);
        }
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            #pragma unroll
            for (int i = 0; i < TILES; ++i) {
                multiply(sum[i], a[h][0].x, a[h][1].x, a[h][0].y, a[h][1].y, b[h][i].x, b[h][i].y);
                multiply(sum[i], a[h][0].z, a[h][1].z, a[h][0].w, a[h][1].w, b[h][i].z, b[h][i].w);
            }
        }
    }
    float* const sums = reinterpret_cast<float*>(ring);
    #pragma unroll
    for (int i = 0; i < TILES * 4; ++i) sums[warp * TILES * 128 + i * 32 + lane] = sum[i / 4][i % 4];
    __syncthreads();
    for (int at = threadIdx.x; at < TILES * 128; at += WARPS * 32) {
        const int n = at % 16, r = at / 16;
        if (r >= count || lowest + n >= R) continue;
        // Where a warp has rank n of token r.
        const int place = ((r / 8 * 2 + n / 8) * 2 + r % 2) * 32 + n % 8 * 4 + r % 8 / 2;
        float total = 0.0f;
        #pragma unroll
        for (int v = 0; v < WARPS; ++v) total += sums[v * TILES * 128 + place];
        out[((size_t(row) * tokens + begin + r) * S + slot) * R + lowest + n] = total;
    }
"""
