"""A part of `quantised_source`: what a block's warps have is put together, then what blocks have that share keys."""

from __future__ import annotations

from typing import Final

MERGE: Final = """
    // What warps have goes where their tiles were.
    float* const sums = reinterpret_cast<float*>(memory);
    float* const tops = sums + WARPS * LINES * D;
    float* const totals = tops + WARPS * LINES;
    __syncthreads();
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int line = warp * LINES + r + h * 8;
        total[h] = of_all_four(plus, total[h]);
        if (c == 0) {
            tops[line] = top[h];
            totals[line] = total[h];
        }
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            offset[of][h] = of_all_four(plus, offset[of][h]);
            #pragma unroll
            for (int i = 0; i < TILES * 2; ++i) {
                const int column = of * GROUP + (c * 2 + i / TILES) * TILES + i % TILES;
                sums[line * D + column] = sum[of][i % TILES][h * 2 + i / TILES] + offset[of][h];
            }
        }
    }
    __syncthreads();
    T* const result = out + (long(row) * tokens + token) * queries_shape[1] * D;
    auto result_of = [&](int line) { return result + (line / HEADS * queries_shape[1] + head + line % HEADS) * D; };
    // What a split has: its lines' sums, their tops, and their totals.
    constexpr int SIZE = SEVERAL * HEADS * (D + 2);
    float* const parts = partial + long(base_block) * splits * SIZE;
    float* const mine = parts + split * SIZE;
    for (int i = threadIdx.x; i < used * D; i += THREADS) {
        const int line = i / D;
        float best = tops[line];
        #pragma unroll
        for (int w = 1; w < WARPS; ++w) best = highest(best, tops[w * LINES + line]);
        float over = 0.0f, under = 0.0f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float kept = exp2f(tops[w * LINES + line] - best);
            over += kept * sums[w * LINES * D + i];
            under += kept * totals[w * LINES + line];
        }
        if (splits == 1) {
            result_of(line)[i % D] = T(over / under);
        } else {
            mine[i] = over;
            if (i % D == 0) {
                mine[SEVERAL * HEADS * D + line] = best;
                mine[SEVERAL * HEADS * (D + 1) + line] = under;
            }
        }
    }
    if (splits == 1) return;

    // The block that comes last puts the splits together, always in one order, and leaves the counter as it was.
    int* const last = reinterpret_cast<int*>(totals + WARPS * LINES);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = const_cast<int*>(counters) + base_block;
        *last = atomicAdd(counter, 1) == splits - 1;
        if (*last) *counter = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    // A lane looks at a split: else each would be waited for.
    float* const kept = sums;
    for (int line = warp; line < used; line += WARPS) {
        float best = NONE, under = 0.0f;
        const float* const of = parts + SEVERAL * HEADS * D + line;
        for (int s = lane; s < splits; s += 32) best = highest(best, __ldcg(of + s * SIZE));
        #pragma unroll
        for (int w = 1; w < 32; w <<= 1) best = highest(best, __shfl_xor_sync(0xffffffffu, best, w));
        for (int s = lane; s < splits; s += 32) {
            kept[s * LINES + line] = exp2f(__ldcg(of + s * SIZE) - best);
            under += kept[s * LINES + line] * __ldcg(of + s * SIZE + SEVERAL * HEADS);
        }
        #pragma unroll
        for (int w = 1; w < 32; w <<= 1) under += __shfl_xor_sync(0xffffffffu, under, w);
        for (int s = lane; s < splits; s += 32) kept[s * LINES + line] /= under;
    }
    __syncthreads();
    for (int i = threadIdx.x * 2; i < used * D; i += THREADS * 2) {
        float2 over = {0.0f, 0.0f};
        #pragma unroll 16
        for (int s = 0; s < splits; ++s) {
            const float2 its = __ldcg(reinterpret_cast<const float2*>(parts + s * SIZE + i));
            over.x += kept[s * LINES + i / D] * its.x;
            over.y += kept[s * LINES + i / D] * its.y;
        }
        T* const to = result_of(i / D) + i % D;
        to[0] = T(over.x);
        to[1] = T(over.y);
    }
"""
