"""The source of `attention_kernel`, in CUDA.

A block takes token `t` of a row and HEADS of the query heads that share key head `g`. LANES threads share a key, so
that each loads 16 bytes of it at a time, and KEYS keys are seen at once. Each lane sums up in float32, with a running
maximum (Milakov and Gimelshein, arXiv:1805.02867), and what the lanes have is merged once at the end. Several blocks
may share the keys (as in Flash-Decoding, Dao et al. 2023): they leave what they have in `partial`, and the last of
them, by `counters`, merges that. Queries and new keys are rotated on their way in, if the model has not done so. T, D
(a head's width), LANES, HEADS, THREADS, FEW (tokens of a row at most), WINDOW and RING (0 for none), ROTATED (values
of a line, 0 for none) and TRADITIONAL are constants, and so is SCALE, of powers of two.
"""

from __future__ import annotations

from typing import Final

HEADER: Final = """
template <typename A> __device__ inline A highest(A a, A b) { return a > b ? a : b; }
template <typename A> __device__ inline A lowest(A a, A b) { return a < b ? a : b; }
"""

MERGE: Final = """
    __shared__ float sums[WARPS][HEADS][D], tops[WARPS][HEADS], totals[WARPS][HEADS];
    const int warp = threadIdx.x / 32;
    #pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        #pragma unroll
        for (int w = LANES; w < 32 && w < THREADS; w <<= 1) {
            const float best = highest(top[h], __shfl_xor_sync(0xffffffffu, top[h], w));
            const float kept = exp2f(top[h] - best);
            top[h] = best;
            total[h] *= kept;
            total[h] += __shfl_xor_sync(0xffffffffu, total[h], w);
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                sum[h][i] *= kept;
                sum[h][i] += __shfl_xor_sync(0xffffffffu, sum[h][i], w);
            }
        }
        if (threadIdx.x % 32 < LANES) {
            tops[warp][h] = top[h];
            totals[warp][h] = total[h];
            #pragma unroll
            for (int i = 0; i < MINE; ++i) sums[warp][h][column_of(i)] = sum[h][i];
        }
    }
    __syncthreads();
    T* result = out + ((long(row) * tokens + t) * queries_shape[1] + head) * D;
    // What a split has: for each head its sums, its highest score, and its total.
    float* parts = partial + long(base_block) * splits * HEADS * (D + 2);
    for (int i = threadIdx.x; i < HEADS * D; i += THREADS) {
        const int h = i / D, column = i % D;
        float best = tops[0][h];
        for (int w = 1; w < WARPS; ++w) best = highest(best, tops[w][h]);
        float over = 0.0f, under = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            const float kept = exp2f(tops[w][h] - best);
            over += kept * sums[w][h][column];
            under += kept * totals[w][h];
        }
        if (splits == 1) {
            result[i] = T(over / under);
        } else {
            float* mine_of = parts + (split * HEADS + h) * (D + 2);
            mine_of[column] = over;
            if (column == 0) {
                mine_of[D] = best;
                mine_of[D + 1] = under;
            }
        }
    }
    if (splits == 1) return;

    // The block that comes last puts the splits together, always in one order, and leaves the counter as it was.
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = const_cast<int*>(counters) + base_block;
        last = atomicAdd(counter, 1) == splits - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    // What each split counts for, by a warp a head; then all columns, whose parts are on their way several at once.
    constexpr int WIDE = THREADS < 32 ? THREADS : 32, APART = HEADS * (D + 2);
    __shared__ float weights[HEADS][MOST_SPLITS];
    for (int h = warp; h < HEADS; h += WARPS) {
        const float* of = parts + h * (D + 2) + D;
        float best = NONE, under = 0.0f;
        for (int s = threadIdx.x % WIDE; s < splits; s += WIDE) best = highest(best, __ldcg(of + s * APART));
        #pragma unroll
        for (int w = WIDE / 2; w > 0; w >>= 1) best = highest(best, __shfl_xor_sync(0xffffffffu, best, w));
        for (int s = threadIdx.x % WIDE; s < splits; s += WIDE) {
            const float kept = exp2f(__ldcg(of + s * APART) - best);
            weights[h][s] = kept;
            under += kept * __ldcg(of + s * APART + 1);
        }
        #pragma unroll
        for (int w = WIDE / 2; w > 0; w >>= 1) under += __shfl_xor_sync(0xffffffffu, under, w);
        for (int s = threadIdx.x % WIDE; s < splits; s += WIDE) weights[h][s] /= under;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEADS * D; i += THREADS) {
        const int h = i / D;
        const float* of = parts + h * (D + 2) + i % D;
        float over = 0.0f;
        #pragma unroll 8
        for (int s = 0; s < splits; ++s) over += weights[h][s] * __ldcg(of + s * APART);
        result[i] = T(over);
    }
"""
"""The end of a kernel: what lanes, warps and splits of a row's keys have is put together."""

_START: Final = """
    constexpr int EACH = 16 / sizeof(T);
    constexpr int VECTORS = D / EACH / LANES;
    constexpr int MINE = VECTORS * EACH;
    constexpr int KEYS = THREADS / LANES;
    constexpr int WARPS = (THREADS + 31) / 32;
    constexpr int DEPTH = MINE <= 8 ? (HEADS <= 4 ? 4 : 2) : 1;
    constexpr float NONE = -1e30f;
    constexpr int MOST_SPLITS = 32;
"""

PLACE: Final = """
    const int tokens = queries_shape[2], groups = keys_shape[1], shared = queries_shape[1] / groups;
    const int splits = counters_shape[0];
    int block = blockIdx.x;
    const int split = block % splits;
    block /= splits;
    const int base_block = block;
    const int t = block % tokens;
    block /= tokens;
    const int part = block % (shared / HEADS);
    block /= shared / HEADS;
    const int g = block % groups, row = block / groups;
    const int head = g * shared + part * HEADS;
    const int lane = threadIdx.x % LANES, mine = threadIdx.x / LANES;
    const int start = starts[row], at = start + t;
    const int low = WINDOW > 0 ? highest(0, at - WINDOW + 1) : 0;
    // A split's keys: `first` to `stop`.
    const int span = (at - low + splits) / splits, first = low + split * span;
    const int stop = first + span - 1 < at ? first + span - 1 : at;
"""
"""Which token, heads and keys are the block's."""

_NEW: Final = """
    const T* new_key = keys + row * keys_strides[0] + g * keys_strides[1];
    const T* new_value = values + row * values_strides[0] + g * values_strides[1];
    const T* old_key = held_keys + row * held_keys_strides[0] + g * held_keys_strides[1];
    const T* old_value = held_values + row * held_values_strides[0] + g * held_values_strides[1];
    auto place = [&](int position) { return long(RING > 0 ? position % RING : position); };

"""

ROTATE: Final = """
    // Column `c` of a line at a position, rotated as MLX's rope does it, and rounded as there.
    auto rotated = [&](const T* line, long step, int c, int position) {
        const float x = float(line[c * step]);
        if (ROTATED == 0 || c >= ROTATED) return x;
        constexpr int HALF = ROTATED / 2;
        const bool second = TRADITIONAL ? c & 1 : c >= HALF;
        const int pair = TRADITIONAL ? c / 2 : second ? c - HALF : c;
        const float y = float(line[(TRADITIONAL ? c ^ 1 : second ? c - HALF : c + HALF) * step]);
        float sine, cosine;
        sincosf(float(position) * frequencies[pair], &sine, &cosine);
        return float(T(second ? y * sine + x * cosine : x * cosine - y * sine));
    };
"""
"""Defines `rotated`."""

_REST: Final = """
    // The queries, and the call's own keys and values up to the token's.
    __shared__ uint4 asked_raw[HEADS * D * sizeof(T) / 16], fresh_raw[2 * FEW * D * sizeof(T) / 16];
    T* asked = reinterpret_cast<T*>(asked_raw);
    T* fresh = reinterpret_cast<T*>(fresh_raw);
    T* fresh_value = fresh + FEW * D;

    // A lane's values of a line of D: vectors of 16 bytes, next to those of its neighbours.
    auto take = [&](const T* line, uint4 (&to)[VECTORS]) {
        #pragma unroll
        for (int v = 0; v < VECTORS; ++v) to[v] = *reinterpret_cast<const uint4*>(line + (v * LANES + lane) * EACH);
    };
    auto gather = [&](const T* line, long step, uint4 (&to)[VECTORS]) {
        T* x = reinterpret_cast<T*>(to);
        #pragma unroll
        for (int i = 0; i < MINE; ++i) x[i] = line[((i / EACH * LANES + lane) * EACH + i % EACH) * step];
    };
    // DEPTH keys of a lane from `base` on, all on their way at once. Behind the last it is the last again.
    auto fetch = [&](int base, const T* old, const auto& strides, bool vectors, const T* own, auto& to) {
        if (vectors) {
            #pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                const int p = lowest(base + j * KEYS + mine, stop);
                take(p < start ? old + place(p) * strides[2] : own + (p - start) * D, to[j]);
            }
            return;
        }
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const int p = lowest(base + j * KEYS + mine, stop);
            if (p < start) gather(old + place(p) * strides[2], strides[3], to[j]);
            else take(own + (p - start) * D, to[j]);
        }
    };
    auto whole = [](const T* lines, const auto& strides) {
        return strides[3] == 1 && strides[2] * sizeof(T) % 16 == 0 && reinterpret_cast<size_t>(lines) % 16 == 0;
    };
    const bool keys_whole = whole(old_key, held_keys_strides), values_whole = whole(old_value, held_values_strides);
    uint4 key_of[DEPTH][VECTORS], value_of[DEPTH][VECTORS];
    auto fetch_keys = [&](int base) { fetch(base, old_key, held_keys_strides, keys_whole, fresh, key_of); };
    auto fetch_values = [&](int base) {
        fetch(base, old_value, held_values_strides, values_whole, fresh_value, value_of);
    };

    // What is there already is on its way while the queries are rotated.
    const bool early = first + KEYS * DEPTH <= start && first <= stop;
    if (early) {
        fetch_keys(first);
        fetch_values(first);
    }

    const T* query_line = queries + row * queries_strides[0] + head * queries_strides[1] + t * queries_strides[2];
    for (int i = threadIdx.x; i < HEADS * D; i += THREADS) {
        asked[i] = T(rotated(query_line + i / D * queries_strides[1], queries_strides[3], i % D, at));
    }
    for (int i = threadIdx.x; i < (t + 1) * D; i += THREADS) {
        fresh[i] = T(rotated(new_key + i / D * keys_strides[2], keys_strides[3], i % D, start + i / D));
        fresh_value[i] = new_value[i / D * values_strides[2] + i % D * values_strides[3]];
    }
    __syncthreads();

    if (part == 0 && split == 0) {
        T* k = const_cast<T*>(old_key) + place(at) * held_keys_strides[2];
        T* v = const_cast<T*>(old_value) + place(at) * held_values_strides[2];
        for (int i = threadIdx.x; i < D; i += THREADS) {
            k[i * held_keys_strides[3]] = fresh[t * D + i];
            v[i * held_values_strides[3]] = fresh_value[t * D + i];
        }
    }

    float query[HEADS][MINE], sum[HEADS][MINE], top[HEADS], total[HEADS];
    #pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        uint4 raw[VECTORS];
        take(asked + h * D, raw);
        #pragma unroll
        for (int i = 0; i < MINE; ++i) {
            query[h][i] = float(reinterpret_cast<const T*>(raw)[i]) * SCALE;
            sum[h][i] = 0.0f;
        }
        top[h] = NONE;
        total[h] = 0.0f;
    }
    if (!early && first <= stop) {
        fetch_keys(first);
        fetch_values(first);
    }

    // All lanes of a warp go round equally often: they exchange values. What comes next is fetched as soon as there is
    // room for it, and arrives during the other half of the work.
    for (int base = first; base <= stop; base += KEYS * DEPTH) {
        const int next = base + KEYS * DEPTH;
        float score[DEPTH][HEADS];
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const T* key = reinterpret_cast<const T*>(key_of[j]);
            #pragma unroll
            for (int h = 0; h < HEADS; ++h) score[j][h] = 0.0f;
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                const float x = float(key[i]);
                #pragma unroll
                for (int h = 0; h < HEADS; ++h) score[j][h] += query[h][i] * x;
            }
        }
        if (next <= stop) fetch_keys(next);
        #pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float best = top[h];
            #pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                #pragma unroll
                for (int w = LANES / 2; w > 0; w >>= 1) score[j][h] += __shfl_xor_sync(0xffffffffu, score[j][h], w);
                if (base + j * KEYS + mine > stop) score[j][h] = NONE;
                best = highest(best, score[j][h]);
            }
            const float kept = exp2f(top[h] - best);
            top[h] = best;
            total[h] *= kept;
            #pragma unroll
            for (int i = 0; i < MINE; ++i) sum[h][i] *= kept;
            #pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                // Where a lane has seen no key yet, `best` is NONE as well, and that is no weight of 1.
                score[j][h] = score[j][h] > NONE ? exp2f(score[j][h] - best) : 0.0f;
                total[h] += score[j][h];
            }
        }
        #pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const T* value = reinterpret_cast<const T*>(value_of[j]);
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                const float x = float(value[i]);
                #pragma unroll
                for (int h = 0; h < HEADS; ++h) sum[h][i] += score[j][h] * x;
            }
        }
        if (next <= stop) fetch_values(next);
    }

    auto column_of = [&](int i) { return (i / EACH * LANES + lane) * EACH + i % EACH; };
"""

SOURCE: Final = _START + PLACE + _NEW + ROTATE + _REST + MERGE
