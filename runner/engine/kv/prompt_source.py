"""The sources of `prompt_kernel`, in CUDA.

WRITE: a block takes token `t` of a row, a thread a pair of values (two that are rotated together, or neighbours) of
every LINES-th line of the token's: its queries, keys and values. D is a line's width, ROTATED and TRADITIONAL are as in
`attention_source`.

ATTEND: FlashAttention-2 (Dao, arXiv:2307.08691). A block takes 16 · WARPS queries of one head, a warp 16 of them. Keys
and values come KEYS at a time into shared memory, while those before are used. Scores are a product of the tensor
cores, which is summed up in float32 and stays in registers: what a thread has of it is just what it needs as the
operand of the product with the values, in 16 bits (PTX ISA, mma.m16n8k16). Lines are 16 bytes longer there than their
values, so that eight of them, of which each gives 16 bytes, lie in different banks. Several blocks may share the keys,
as in `attention_source`. T, D, WARPS, KEYS and WINDOW (0 for
none) are constants, and so is SCALE, of powers of two. DEVICE is what only a GPU can do, beside that of
`tensor_cores`; tests on the host have their own in its place.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
// Four 8 × 8 matrices, of which lane i points at line i % 8 of matrix i / 8. A thread gets the two values at
// lane % 4 * 2 of line lane / 4 of each; with COLUMNS, of column lane / 4.
template <bool COLUMNS> __device__ inline void matrices(unsigned (&to)[4], const T* line) {
    const unsigned from = unsigned(__cvta_generic_to_shared(line));
    if (COLUMNS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    }
}
__device__ inline unsigned pair(float first, float second) {
    unsigned both;
    asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
"""

WRITE: Final = """
    constexpr int PAIRS = D / 2, HALF = ROTATED / 2;
    const int heads = queries_shape[1], tokens = queries_shape[2], groups = keys_shape[1];
    const int t = blockIdx.x % tokens, row = blockIdx.x / tokens, at = starts[row] + t;
    const int which = threadIdx.x % PAIRS;
    const bool turned = which < HALF;
    const bool halves = turned && !TRADITIONAL;
    const int first = halves ? which : which * 2, second = halves ? which + HALF : which * 2 + 1;
    float sine = 0.0f, cosine = 1.0f;
    if (turned) sincosf(float(at) * frequencies[which], &sine, &cosine);
    const T* const query = queries + row * queries_strides[0] + t * queries_strides[2];
    const T* const key = keys + row * keys_strides[0] + t * keys_strides[2];
    const T* const value = values + row * values_strides[0] + t * values_strides[2];
    // The planes are written in place: see attention_kernel.
    T* const held_key = const_cast<T*>(held_keys) + row * held_keys_strides[0] + at * held_keys_strides[2];
    T* const held_value = const_cast<T*>(held_values) + row * held_values_strides[0] + at * held_values_strides[2];
    #pragma unroll 4
    for (int i = threadIdx.x / PAIRS; i < heads + 2 * groups; i += LINES) {
        const bool asks = i < heads, is_key = !asks && i < heads + groups;
        const int head = asks ? i : is_key ? i - heads : i - heads - groups;
        const T* from = asks ? query + head * queries_strides[1] : is_key ? key + head * keys_strides[1]
                                                                          : value + head * values_strides[1];
        T* to = asks ? rotated + ((long(row) * heads + head) * tokens + t) * D
                     : is_key ? held_key + head * held_keys_strides[1] : held_value + head * held_values_strides[1];
        const long step = asks ? queries_strides[3] : is_key ? keys_strides[3] : values_strides[3];
        const long apart = asks ? 1 : is_key ? held_keys_strides[3] : held_values_strides[3];
        // Values are neighbours' pairs; nothing turns them.
        const bool turns = turned && (asks || is_key);
        const int left = asks || is_key ? first : which * 2, right = asks || is_key ? second : which * 2 + 1;
        const float x = float(from[left * step]), y = float(from[right * step]);
        to[left * apart] = T(turns ? x * cosine - y * sine : x);
        to[right * apart] = T(turns ? x * sine + y * cosine : y);
    }
"""

ATTEND: Final = """
    constexpr int QUERIES = 16 * WARPS, THREADS = 32 * WARPS, VECTORS = D / 8, LINE = D + 8, TILE = KEYS * LINE;
    constexpr float NONE = -1e30f;
    const int rows = queries_shape[0], heads = queries_shape[1], tokens = queries_shape[2], groups = held_keys_shape[1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The last queries of a prompt have most to read, so they come first.
    const int splits = counters_shape[0], split = blockIdx.x % splits, block = blockIdx.x / splits;
    const int head = block % heads, row = block / heads % rows, g = head / (heads / groups);
    const int first = ((tokens + QUERIES - 1) / QUERIES - 1 - block / heads / rows) * QUERIES;
    const int start = starts[row], last = start + (first + QUERIES < tokens ? first + QUERIES : tokens) - 1;
    const int lowest = WINDOW > 0 && start + first >= WINDOW ? (start + first - WINDOW + 1) / KEYS * KEYS : 0;
    // A split's keys: `from` to `end`.
    const int span = ((last - lowest) / KEYS + splits) / splits * KEYS, from = lowest + split * span;
    const int end = from + span - 1 < last ? from + span - 1 : last;

    const T* const old_keys = held_keys + row * held_keys_strides[0] + g * held_keys_strides[1];
    const T* const old_values = held_values + row * held_values_strides[0] + g * held_values_strides[1];
    T* const asked = reinterpret_cast<T*>(ring);
    T* const tiles = asked + QUERIES * LINE;
    // Lines `base` to base + count - 1 into shared memory, zeros for those from `stop` on.
    auto fetch = [&](T* to, const T* plane, long next, long step, int base, int count, int stop) {
        const bool whole = step == 1 && next % 8 == 0 && reinterpret_cast<size_t>(plane) % 16 == 0;
        for (int i = threadIdx.x; i < count * VECTORS; i += THREADS) {
            const int line = i / VECTORS, column = i % VECTORS * 8;
            T* const into = to + line * LINE + column;
            const T* const its = plane + (base + line) * next + column * step;
            if (whole) {
                copy(reinterpret_cast<uint4*>(into), its, base + line < stop);
            } else {
                for (int e = 0; e < 8; ++e) into[e] = base + line < stop ? its[e * step] : T(0.0f);
            }
        }
    };
    auto fetch_both = [&](int base) {
        T* const to = tiles + (base / KEYS & 1) * 2 * TILE;
        fetch(to, old_keys, held_keys_strides[2], held_keys_strides[3], base, KEYS, end + 1);
        fetch(to + TILE, old_values, held_values_strides[2], held_values_strides[3], base, KEYS, end + 1);
        close_group();
    };
    fetch(asked, queries + (long(row) * heads + head) * tokens * D, D, 1, first, QUERIES, tokens);
    fetch_both(from);

    // A thread has queries lane / 4 and lane / 4 + 8 of its warp's, and of each 8 columns lane % 4 * 2 and the next.
    float sum[D / 8][4], top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
    #pragma unroll
    for (int d = 0; d < D / 8; ++d) sum[d][0] = sum[d][1] = sum[d][2] = sum[d][3] = 0.0f;
    const int lines = start + first + warp * 16, line = lines + lane / 4;
    for (int base = from; base <= end; base += KEYS) {
        wait_for_groups<0>();
        // What comes next takes the place of what every warp is done with by now.
        __syncthreads();
        if (base + KEYS <= end) fetch_both(base + KEYS);
        const T* const tile = tiles + (base / KEYS & 1) * 2 * TILE;
        float score[KEYS / 8][4];
        #pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
        #pragma unroll
        for (int d = 0; d < D; d += 16) {
            unsigned a[4];
            matrices<false>(a, asked + (warp * 16 + lane % 16) * LINE + d + lane / 16 * 8);
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                unsigned b[4];
                matrices<false>(b, tile + (n * 8 + lane / 16 * 8 + lane % 8) * LINE + d + lane / 8 % 2 * 8);
                multiply(score[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                multiply(score[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }

        const bool all = base + KEYS - 1 <= lines && (WINDOW == 0 || base > lines + 15 - WINDOW);
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = line + h * 8;
            float best = top[h];
            #pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) {
                float& s = score[i / 2][h * 2 + i % 2];
                const int p = base + i / 2 * 8 + lane % 4 * 2 + i % 2;
                s = all || (p <= at && (WINDOW == 0 || p > at - WINDOW)) ? s * SCALE : NONE;
                best = s > best ? s : best;
            }
            #pragma unroll
            for (int w = 1; w < 4; w <<= 1) {
                const float other = __shfl_xor_sync(0xffffffffu, best, w);
                best = other > best ? other : best;
            }
            // What a query has summed up before it saw its first key counts for nothing then.
            const float kept = power_of_two(top[h] - best);
            top[h] = best;
            total[h] *= kept;
            #pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                sum[d][h * 2] *= kept;
                sum[d][h * 2 + 1] *= kept;
            }
            #pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) {
                float& s = score[i / 2][h * 2 + i % 2];
                s = power_of_two(s - best);
                total[h] += s;
            }
        }

        #pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            const unsigned a0 = pair(score[n][0], score[n][1]), a1 = pair(score[n][2], score[n][3]);
            const unsigned a2 = pair(score[n + 1][0], score[n + 1][1]), a3 = pair(score[n + 1][2], score[n + 1][3]);
            #pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                unsigned b[4];
                matrices<true>(b, tile + TILE + (n * 8 + lane % 16) * LINE + d * 8 + lane / 16 * 8);
                multiply(sum[d], a0, a1, a2, a3, b[0], b[1]);
                multiply(sum[d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }

    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        #pragma unroll
        for (int w = 1; w < 4; w <<= 1) total[h] += __shfl_xor_sync(0xffffffffu, total[h], w);
        const int query = warp * 16 + lane / 4 + h * 8;
        if (first + query >= tokens) continue;
        if (splits == 1) {
            T* const to = out + ((long(row) * tokens + first + query) * heads + head) * D + lane % 4 * 2;
            #pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                *reinterpret_cast<unsigned*>(to + d * 8) = pair(sum[d][h * 2] / total[h], sum[d][h * 2 + 1] / total[h]);
            }
        } else {
            // What a split has: for each query its sums, its highest score, and its total.
            float* const mine = partial + ((long(block) * splits + split) * QUERIES + query) * (D + 2);
            #pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                mine[d * 8 + lane % 4 * 2] = sum[d][h * 2];
                mine[d * 8 + lane % 4 * 2 + 1] = sum[d][h * 2 + 1];
            }
            if (lane % 4 == 0) mine[D] = top[h], mine[D + 1] = total[h];
        }
    }
    if (splits == 1) return;

    // The block that comes last puts the splits together, always in one order, and leaves the counter as it was.
    __shared__ int latest;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* const counter = const_cast<int*>(counters) + block;
        latest = atomicAdd(counter, 1) == splits - 1;
        if (latest) *counter = 0;
    }
    __syncthreads();
    if (!latest) return;
    __threadfence();
    for (int i = threadIdx.x * 2; i < QUERIES * D; i += THREADS * 2) {
        const int query = i / D, column = i % D;
        if (first + query >= tokens) continue;
        const float* const of = partial + (long(block) * splits * QUERIES + query) * (D + 2);
        float best = NONE, over = 0.0f, next = 0.0f, under = 0.0f;
        for (int s = 0; s < splits; ++s) {
            const float* const its = of + long(s) * QUERIES * (D + 2);
            const float high = __ldcg(its + D), higher = high > best ? high : best;
            const float kept = power_of_two(best - higher), more = power_of_two(high - higher);
            over = over * kept + __ldcg(its + column) * more;
            next = next * kept + __ldcg(its + column + 1) * more;
            under = under * kept + __ldcg(its + D + 1) * more;
            best = higher;
        }
        T* const to = out + ((long(row) * tokens + first + query) * heads + head) * D + column;
        *reinterpret_cast<unsigned*>(to) = pair(over / under, next / under);
    }
"""
