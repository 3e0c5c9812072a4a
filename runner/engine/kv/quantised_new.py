"""A part of `quantised_source`: a block's queries and the call's own keys and values, rotated, packed, and written."""

from __future__ import annotations

from typing import Final

NEW: Final = """
    // Blocks that see own tokens: the tiles of these are next to each other.
    const int newest = highest(start / KEYS - low, 0);
    auto of_split = [&](int tile) { return unsigned(tile / WARPS) % unsigned(blocks) == unsigned(split); };
    const bool writes = of_split(newest), own = writes || of_split(tiles - 1);
    // Queries, and the call's own keys and values up to the block's tokens, rotated as MLX's rope does it, and rounded
    // as there. A thread has pairs of columns, which are rotated together, or neighbours. Several are on their way at
    // once.
    {
        constexpr int COUPLES = D / 2, HALF = ROTATED / 2, TOGETHER = 2;
        const int seen = own ? token + count : 0, items = (used + 2 * seen) * COUPLES;
        const T* const query = queries + row * queries_strides[0] + head * queries_strides[1]
            + token * queries_strides[2];
        const T* const key = line_of(keys, keys_strides, 0);
        const T* const value = line_of(values, values_strides, 0);
        for (int base = threadIdx.x; base < items; base += THREADS * TOGETHER) {
            float x[TOGETHER], y[TOGETHER], frequency[TOGETHER];
            #pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int item = base + i * THREADS < items ? base + i * THREADS : items - 1;
                const int n = item / COUPLES, which = item % COUPLES, of = n - used;
                const bool turned = HALF > 0 && which < HALF, halves = turned && !TRADITIONAL;
                const T* const from = of < 0 ? query + n % HEADS * queries_strides[1] + n / HEADS * queries_strides[2]
                    : of < seen ? key + of * keys_strides[2] : value + (of - seen) * values_strides[2];
                const int step = of < 0 ? queries_strides[3] : of < seen ? keys_strides[3] : values_strides[3];
                frequency[i] = turned ? frequencies[which] : 0.0f;
                x[i] = float(from[(halves ? which : which * 2) * step]);
                y[i] = float(from[(halves ? which + HALF : which * 2 + 1) * step]);
            }
            #pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int item = base + i * THREADS, n = item / COUPLES, which = item % COUPLES, of = n - used;
                if (item >= items) continue;
                const bool turned = HALF > 0 && which < HALF, halves = turned && !TRADITIONAL;
                if (turned && of < seen) {
                    const float angle = float(of < 0 ? least + n / HEADS : start + of) * frequency[i], was = x[i];
                    float sine, cosine;
                    sincosf(angle, &sine, &cosine);
                    x[i] = was * cosine - y[i] * sine;
                    y[i] = was * sine + y[i] * cosine;
                }
                T* const to = of < 0 ? asked + n * D : plain + (of < seen ? of : FEW + of - seen) * D;
                to[halves ? which : which * 2] = T(x[i]);
                to[halves ? which + HALF : which * 2 + 1] = T(y[i]);
            }
        }
    }
    __syncthreads();
    // These packed as mx.quantize does it: a warp packs a group.
    for (int item = warp; own && item < (token + count) * 2 * GROUPS; item += WARPS) {
        const int n = item / (2 * GROUPS), what = item / GROUPS % 2, of = item % GROUPS;
        const T* x = plain + (what * FEW + n) * D + of * GROUP;
        float least = LEAST, most = MOST;
        for (int i = lane; i < GROUP; i += 32) {
            least = lowest(least, float(x[i]));
            most = highest(most, float(x[i]));
        }
        #pragma unroll
        for (int w = 1; w < 32; w <<= 1) {
            least = lowest(least, __shfl_xor_sync(0xffffffffu, least, w));
            most = highest(most, __shfl_xor_sync(0xffffffffu, most, w));
        }
        constexpr uint32_t MASK = (1u << BITS) - 1u;
        float scale = highest((most - least) / float(MASK), 1e-7f);
        const bool side = fabsf(least) > fabsf(most);
        scale = side ? scale : -scale;
        const float edge = side ? least : most, q0 = roundf(edge / scale);
        scale = q0 == 0.0f ? scale : edge / q0;
        const float bias = q0 == 0.0f ? 0.0f : edge;
        if (lane == 0) {
            fresh_numbers[(what * 2 * FEW + n) * GROUPS + of] = T(scale);
            fresh_numbers[((what * 2 + 1) * FEW + n) * GROUPS + of] = T(bias);
        }
        for (int word = lane; word < GROUP / PER_WORD; word += 32) {
            uint32_t packed = 0;
            for (int i = 0; i < PER_WORD; ++i) {
                const float q = roundf((float(x[word * PER_WORD + i]) - bias) / scale);
                packed |= uint32_t(lowest(q, float(MASK))) << (i * BITS);
            }
            fresh[(what * FEW + n) * LINE + of * (GROUP / PER_WORD) + word] = packed;
        }
    }
    if (own) __syncthreads();
    // The planes are written in place: see attention_kernel.
    if (part == 0 && writes) {
        for (int n = token; n < token + count; ++n) {
            #pragma unroll
            for (int what = 0; what < 2; ++what) {
                uint32_t* to = writable(codes_at(what, start + n));
                for (int i = threadIdx.x; i < LINE; i += THREADS) to[i] = fresh[(what * FEW + n) * LINE + i];
            }
            for (int i = threadIdx.x; i < 4 * GROUPS; i += THREADS) {
                const int which = i / GROUPS, of = i % GROUPS;
                writable(numbers_of(which, start + n))[of] = fresh_numbers[(which * FEW + n) * GROUPS + of];
            }
        }
    }
"""
