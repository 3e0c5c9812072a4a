"""A part of `quantised_source`: a block's queries and the call's own keys and values, rotated, packed, and written."""

from __future__ import annotations

from typing import Final

NEW: Final = """
    for (int i = threadIdx.x; i < LINES * D; i += THREADS) {
        const int line = i / D, n = token + line / HEADS;
        float x = 0.0f;
        if (line < used) {
            const T* from = queries + row * queries_strides[0] + (head + line % HEADS) * queries_strides[1];
            x = rotated(from + n * queries_strides[2], queries_strides[3], i % D, start + n);
        }
        asked[line * (D + 4) + i % D] = x;
    }
    // The call's own keys (rotated, if the model has not done so) and values up to the block's tokens, and these packed
    // as mx.quantize does it, where they are seen.
    const bool own = begin < end && end * KEYS > start;
    if (own) {
        for (int i = threadIdx.x; i < (token + count) * D; i += THREADS) {
            const int n = i / D;
            plain[i] = T(rotated(line_of(keys, keys_strides, n), keys_strides[3], i % D, start + n));
            plain[FEW * D + i] = line_of(values, values_strides, n)[i % D * values_strides[3]];
        }
    }
    __syncthreads();
    // A warp packs a group.
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
    __syncthreads();
    if (part == 0 && begin <= at / KEYS && at / KEYS < end) {
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
