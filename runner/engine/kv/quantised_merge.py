"""A part of `quantised_source`: what a block's warps have is put together, then what blocks have that share keys."""

from __future__ import annotations

from typing import Final

MERGE: Final = """
    // A warp's sums go where its tiles were.
    float* const tops = reinterpret_cast<float*>(memory) + ROOM;
    float* const totals = tops + WARPS * LINES;
    wait_for_groups<0>();
    __syncwarp();
    #pragma unroll
    for (int n = 0; n < SETS; ++n) {
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int line = n * 8 + t * 2 + q;
            total[n][q] = of_all_eight(plus, total[n][q]);
            #pragma unroll
            for (int of = 0; of < GROUPS; ++of) offset[of][n][q] = of_all_eight(plus, offset[of][n][q]);
            if (line >= used) continue;
            if (g == 0) {
                tops[warp * LINES + line] = top[n][q];
                totals[warp * LINES + line] = total[n][q];
            }
            #pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const float more = offset[i / (GROUP / 16)][n][q];
                float* const to = reinterpret_cast<float*>(ring) + line * LONG
                    + (i / PRODUCTS * 8 + g) * PAIRS + i % PRODUCTS * 2;
                *reinterpret_cast<float2*>(to) = {sum[n][i][q] + more, sum[n][i][q + 2] + more};
            }
        }
    }
    __syncthreads();
    T* const result = out + ((long(row) * tokens + token) * queries_shape[1] + head) * D;
    auto put = [&](int i, float x, float y) {
        const int line = i / D;
        T* const to = result + (long(line / HEADS) * queries_shape[1] + line % HEADS) * D + i % D;
        to[0] = T(x);
        to[1] = T(y);
    };
    // What a split has: its lines' sums, their tops, and their totals.
    constexpr int SIZE = LINES * (D + 2);
    float* const parts = partial + long(base_block) * splits * SIZE;
    float* const its_parts = parts + split * SIZE;
    for (int i = threadIdx.x * 2; i < used * D; i += THREADS * 2) {
        const int line = i / D;
        float best = NONE, x = 0.0f, y = 0.0f, under = 0.0f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) best = highest(best, tops[w * LINES + line]);
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float kept = power_of_two(tops[w * LINES + line] - best);
            const float2 its = *reinterpret_cast<const float2*>(bytes + w * APART + (line * LONG + i % D) * 4);
            x += kept * its.x;
            y += kept * its.y;
            under += kept * totals[w * LINES + line];
        }
        if (blocks == 1) {
            put(i, x / under, y / under);
        } else {
            *reinterpret_cast<float2*>(its_parts + i) = {x, y};
            if (i % D == 0) {
                its_parts[LINES * D + line] = best;
                its_parts[LINES * (D + 1) + line] = under;
            }
        }
    }
    if (blocks == 1) return;

    // The block that comes last puts the splits together, always in one order, and leaves the counter as it was.
    int* const last = reinterpret_cast<int*>(totals + WARPS * LINES);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = const_cast<int*>(counters) + base_block;
        *last = atomicAdd(counter, 1) == blocks - 1;
        if (*last) *counter = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    // Splits' sums are on their way, many at once, while warps find out what they count for, a lane a split.
    constexpr int TOGETHER = 32;
    float2 its[TOGETHER];
    auto look = [&](int i, int from) {
        #pragma unroll
        for (int s = 0; s < TOGETHER; ++s) {
            const float* const of = parts + lowest(from + s, blocks - 1) * SIZE + i;
            its[s] = __ldcg(reinterpret_cast<const float2*>(of));
        }
    };
    const int first = threadIdx.x * 2;
    if (first < used * D) look(first, 0);
    float* const kept = reinterpret_cast<float*>(memory);
    for (int line = warp; line < used; line += WARPS) {
        constexpr int EACH = MOST_SPLITS / 32;
        float high[EACH], of[EACH], best = NONE, under = 0.0f;
        #pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float* const from = parts + lowest(lane + i * 32, blocks - 1) * SIZE + LINES * D + line;
            const bool there = lane + i * 32 < blocks;
            high[i] = there ? __ldcg(from) : NEVER;
            of[i] = there ? __ldcg(from + LINES) : 0.0f;
            best = highest(best, high[i]);
        }
        #pragma unroll
        for (int w = 1; w < 32; w <<= 1) best = highest(best, __shfl_xor_sync(0xffffffffu, best, w));
        #pragma unroll
        for (int i = 0; i < EACH; ++i) {
            high[i] = power_of_two(high[i] - best);
            under += high[i] * of[i];
        }
        #pragma unroll
        for (int w = 1; w < 32; w <<= 1) under += __shfl_xor_sync(0xffffffffu, under, w);
        #pragma unroll
        for (int i = 0; i < EACH; ++i) kept[line * MOST_SPLITS + lane + i * 32] = high[i] / under;
    }
    __syncthreads();
    for (int i = first; i < used * D; i += THREADS * 2) {
        float x = 0.0f, y = 0.0f;
        for (int from = 0; from < blocks; from += TOGETHER) {
            if (i != first || from > 0) look(i, from);
            #pragma unroll
            for (int s = 0; s < TOGETHER; ++s) {
                // Behind the last split it is zero.
                const float share = kept[i / D * MOST_SPLITS + from + s];
                x += share * its[s].x;
                y += share * its[s].y;
            }
        }
        put(i, x, y);
    }
"""
