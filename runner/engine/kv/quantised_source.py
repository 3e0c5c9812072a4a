"""The source of `quantised_kernel`, in CUDA: `attention_source` over keys and values in BITS bits.

A block takes token `t` of a row and HEADS of the query heads that share key head `g`, LANES threads share a key, and
KEYS keys are seen at once. Of a key, a lane has MINE values that share a scale and a bias, so that nothing is unpacked:
with k = s·w + b, a query's product is s·Σ q·w + b·Σ q, and the sum of weighted values is Σ (p·s)·w + Σ p·b. T, D (a
head's width), BITS, GROUP (values to a scale), MINE, LANES, HEADS, THREADS, FEW, ROTATED, TRADITIONAL and
WINDOW (0 for none) are constants, and so are SCALE, of powers of two, and LEAST and MOST, with which MLX begins to look
for the range of a group.
"""

from __future__ import annotations

from typing import Final

from runner.engine.kv.attention_source import MERGE, PLACE, ROTATE

HEADER: Final = """
template <typename A, typename B> __device__ inline void assign(A& to, B value) { to = A(value); }
template <typename A> __device__ inline A* writable(const A* held) { return const_cast<A*>(held); }
"""

_START: Final = """
    constexpr int PER_WORD = 32 / BITS;
    constexpr int WORDS = MINE / PER_WORD;
    constexpr int LINE = D / PER_WORD;
    constexpr int GROUPS = D / GROUP;
    constexpr int KEYS = THREADS / LANES;
    constexpr int WARPS = (THREADS + 31) / 32;
    constexpr int DEPTH = HEADS <= 4 ? 2 : 1;
    constexpr float NONE = -1e30f;
    constexpr uint32_t MASK = (1u << BITS) - 1u;
"""

_REST: Final = """
    auto line_of = [&](const auto* held, const auto& strides, int p) {
        return held + row * strides[0] + g * strides[1] + p * strides[2];
    };

    // The queries, the call's own keys (rotated, if the model has not done so) and values up to the token's, and these
    // packed as mx.quantize does it.
    __shared__ float asked[HEADS][D];
    __shared__ uint4 plain_raw[2][FEW][D * sizeof(T) / 16], fresh_raw[2][FEW][(LINE + 3) / 4];
    __shared__ float fresh_scales[2][FEW][GROUPS], fresh_biases[2][FEW][GROUPS];
    auto plain = [&](int what, int n) { return reinterpret_cast<T*>(plain_raw[what][n]); };
    auto fresh = [&](int what, int n) { return reinterpret_cast<uint32_t*>(fresh_raw[what][n]); };
    const T* query_line = queries + row * queries_strides[0] + head * queries_strides[1] + t * queries_strides[2];
    for (int i = threadIdx.x; i < HEADS * D; i += THREADS) {
        asked[i / D][i % D] = rotated(query_line + i / D * queries_strides[1], queries_strides[3], i % D, at);
    }
    for (int i = threadIdx.x; i < (t + 1) * D; i += THREADS) {
        const int n = i / D;
        plain(0, n)[i % D] = T(rotated(line_of(keys, keys_strides, n), keys_strides[3], i % D, start + n));
        plain(1, n)[i % D] = line_of(values, values_strides, n)[i % D * values_strides[3]];
    }
    __syncthreads();
    // A warp packs a group.
    constexpr int STEP = THREADS < 32 ? THREADS : 32;
    for (int item = threadIdx.x / 32; item < (t + 1) * 2 * GROUPS; item += WARPS) {
        const int n = item / (2 * GROUPS), what = item / GROUPS % 2, of = item % GROUPS, l = threadIdx.x % STEP;
        const T* x = plain(what, n) + of * GROUP;
        float least = LEAST, most = MOST;
        for (int i = l; i < GROUP; i += STEP) {
            least = lowest(least, float(x[i]));
            most = highest(most, float(x[i]));
        }
        #pragma unroll
        for (int w = 1; w < STEP; w <<= 1) {
            least = lowest(least, __shfl_xor_sync(0xffffffffu, least, w));
            most = highest(most, __shfl_xor_sync(0xffffffffu, most, w));
        }
        float scale = highest((most - least) / float(MASK), 1e-7f);
        const bool side = fabsf(least) > fabsf(most);
        scale = side ? scale : -scale;
        const float edge = side ? least : most, q0 = roundf(edge / scale);
        scale = q0 == 0.0f ? scale : edge / q0;
        const float bias = q0 == 0.0f ? 0.0f : edge;
        if (l == 0) {
            fresh_scales[what][n][of] = float(T(scale));
            fresh_biases[what][n][of] = float(T(bias));
        }
        for (int word = l; word < GROUP / PER_WORD; word += STEP) {
            uint32_t packed = 0;
            for (int i = 0; i < PER_WORD; ++i) {
                const float q = roundf((float(x[word * PER_WORD + i]) - bias) / scale);
                packed |= uint32_t(lowest(q, float(MASK))) << (i * BITS);
            }
            fresh(what, n)[of * (GROUP / PER_WORD) + word] = packed;
        }
    }
    __syncthreads();

    auto copy = [&](const auto* held, const auto& strides, const auto* from, int width) {
        auto* to = writable(line_of(held, strides, at));
        for (int i = threadIdx.x; i < width; i += THREADS) assign(to[i], from[i]);
    };
    if (part == 0 && split == 0) {
        copy(held_keys, held_keys_strides, fresh(0, t), LINE);
        copy(held_key_scales, held_key_scales_strides, fresh_scales[0][t], GROUPS);
        copy(held_key_biases, held_key_biases_strides, fresh_biases[0][t], GROUPS);
        copy(held_values, held_values_strides, fresh(1, t), LINE);
        copy(held_value_scales, held_value_scales_strides, fresh_scales[1][t], GROUPS);
        copy(held_value_biases, held_value_biases_strides, fresh_biases[1][t], GROUPS);
    }

    auto load = [&](const uint32_t* line, uint32_t (&to)[WORDS]) {
        const uint32_t* from = line + lane * WORDS;
        if constexpr (WORDS % 4 == 0) {
            #pragma unroll
            for (int w = 0; w < WORDS; w += 4) {
                const uint4 four = *reinterpret_cast<const uint4*>(from + w);
                to[w] = four.x;
                to[w + 1] = four.y;
                to[w + 2] = four.z;
                to[w + 3] = four.w;
            }
        } else {
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            to[0] = two.x;
            to[1] = two.y;
        }
    };
    auto value_of = [](const uint32_t (&words)[WORDS], int i) {
        return float((words[i / PER_WORD] >> (i % PER_WORD * BITS)) & MASK);
    };
    const int group = lane * MINE / GROUP;

    float query[HEADS][MINE], sum[HEADS][MINE], all[HEADS], offset[HEADS], top[HEADS], total[HEADS];
    #pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        all[h] = offset[h] = total[h] = 0.0f;
        top[h] = NONE;
        #pragma unroll
        for (int i = 0; i < MINE; ++i) {
            query[h][i] = asked[h][lane * MINE + i] * SCALE;
            all[h] += query[h][i];
            sum[h][i] = 0.0f;
        }
    }

    // All lanes of a warp go round equally often: they exchange values.
    for (int base = first; base <= stop; base += KEYS * DEPTH) {
        uint32_t key[DEPTH][WORDS], value[DEPTH][WORDS];
        float scale[DEPTH], bias[DEPTH], value_scale[DEPTH], value_bias[DEPTH], score[DEPTH][HEADS];
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const int p = base + j * KEYS + mine;
            if (p <= stop && p < start) {
                load(line_of(held_keys, held_keys_strides, p), key[j]);
                load(line_of(held_values, held_values_strides, p), value[j]);
                scale[j] = float(line_of(held_key_scales, held_key_scales_strides, p)[group]);
                bias[j] = float(line_of(held_key_biases, held_key_biases_strides, p)[group]);
                value_scale[j] = float(line_of(held_value_scales, held_value_scales_strides, p)[group]);
                value_bias[j] = float(line_of(held_value_biases, held_value_biases_strides, p)[group]);
            } else {
                // Beyond what is seen any line will do that is there: its weight is zero.
                const int n = p <= stop ? p - start : t;
                load(fresh(0, n), key[j]);
                load(fresh(1, n), value[j]);
                scale[j] = fresh_scales[0][n][group];
                bias[j] = fresh_biases[0][n][group];
                value_scale[j] = fresh_scales[1][n][group];
                value_bias[j] = fresh_biases[1][n][group];
            }
        }
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            #pragma unroll
            for (int h = 0; h < HEADS; ++h) score[j][h] = 0.0f;
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                const float w = value_of(key[j], i);
                #pragma unroll
                for (int h = 0; h < HEADS; ++h) score[j][h] += query[h][i] * w;
            }
            #pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                score[j][h] = score[j][h] * scale[j] + all[h] * bias[j];
                #pragma unroll
                for (int w = LANES / 2; w > 0; w >>= 1) score[j][h] += __shfl_xor_sync(0xffffffffu, score[j][h], w);
            }
        }
        #pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float best = top[h];
            #pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                if (base + j * KEYS + mine <= stop) best = highest(best, score[j][h]);
            }
            const float kept = exp2f(top[h] - best);
            top[h] = best;
            total[h] *= kept;
            offset[h] *= kept;
            #pragma unroll
            for (int i = 0; i < MINE; ++i) sum[h][i] *= kept;
            #pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                score[j][h] = base + j * KEYS + mine <= stop ? exp2f(score[j][h] - best) : 0.0f;
                total[h] += score[j][h];
                offset[h] += score[j][h] * value_bias[j];
                score[j][h] *= value_scale[j];
            }
        }
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                const float w = value_of(value[j], i);
                #pragma unroll
                for (int h = 0; h < HEADS; ++h) sum[h][i] += score[j][h] * w;
            }
        }
    }

    #pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        #pragma unroll
        for (int i = 0; i < MINE; ++i) sum[h][i] += offset[h];
    }
    auto column_of = [&](int i) { return lane * MINE + i; };
"""

SOURCE: Final = _START + PLACE + ROTATE + _REST + MERGE
