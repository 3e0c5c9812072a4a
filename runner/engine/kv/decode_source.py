"""The source of `decode_kernel`, in CUDA: attention of few tokens by tensor cores, in 16 bits.

A block takes up to SEVERAL tokens of a row, and HEADS of the query heads that share key head `g`: these are the columns
of a product whose lines are keys, so that keys are read once for all of them. Its warps take turns at tiles of 16 keys,
and so do the blocks that share a row's keys (as in Flash-Decoding, Dao et al. 2023): which tile a warp has first does
not depend on how long the row is. So what a short batch waits for first, keys and values, is under way before anything
is known of the row.

A thread copies into shared memory what it reads itself, STAGES tiles ahead, and so nobody waits for others: of two keys
every fourth vector of 16 bytes, and of four values every eighth. In a product of scores a key's vector are inputs of
two products, as the queries' are (`product_source`). Scores leave a thread with two keys of two queries; in 16 bits,
and each 8 × 8 of them transposed, they are what the values' product takes (PTX ISA, mma.m16n8k16). Its lines are the
values' columns, so that a thread makes pairs of what it has of two of them. Sums are relative to a score that is seldom
changed, since the highest may be up to 256 times as much; they are merged once at the end, of warps, then of blocks:
those leave what they have in `partial`, and the last of them, by `counters`, merges that.

T, D (a head's width, whole 64), GROUPS (key heads), PARTS and HEADS (query heads of a key head are PARTS · HEADS), SETS
(eights of queries of a block), WARPS, STAGES, FEW (tokens of a row at most), WINDOW and RING (0 for none), ROTATED
(values of a line, 0 for none) and TRADITIONAL are constants, and so are SCALE, of powers of two, CROWD (blocks that
keep a GPU busy) and SHARE (tiles that are worth a block where there are so many). DEVICE is what only a GPU can do,
beside that of `tensor_cores` and `prompt_source`.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
// An 8 × 8 matrix of 16 bits, of which a thread has the two values at lane % 4 * 2 of line lane / 4, transposed.
__device__ inline unsigned transposed(unsigned two) {
    unsigned result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
    return result;
}
"""

JOINED: Final = """
    // Queries, keys and values [rows, heads, tokens, D] as one product has them, side by side.
    constexpr int ALL = GROUPS * PARTS * HEADS;
    const int queries_shape[3] = {joined_shape[0], ALL, joined_shape[1]};
    const long across = joined_strides[2];
    const long queries_strides[4] = {joined_strides[0], D * across, joined_strides[1], across};
    const long* const keys_strides = queries_strides;
    const long* const values_strides = queries_strides;
    const T* const queries = joined;
    const T* const keys = queries + ALL * D * across;
    const T* const values = keys + GROUPS * D * across;
"""
"""What stands before the source of a kernel that gets them so."""

_PLACE: Final = """
    constexpr int THREADS = WARPS * 32, LINES = SETS * 8, SEVERAL = LINES / HEADS, HALVES = D / 16, TILE = 2 * HALVES;
    constexpr float NONE = -1e30f, NEVER = -1e38f;
    const int tokens = queries_shape[2], splits = counters_shape[0];
    const int sets = FEW == 1 ? 1 : (tokens + SEVERAL - 1) / SEVERAL;
    // A division by what is only known here takes as long as a load. Splits are a power of two.
    const int split = blockIdx.x & (splits - 1), base_block = blockIdx.x >> (__ffs(splits) - 1);
    const int token = FEW == 1 ? 0 : base_block % sets * SEVERAL, piece = FEW == 1 ? base_block : base_block / sets;
    const int part = piece % PARTS, head_of_keys = piece / PARTS % GROUPS, row = piece / (PARTS * GROUPS);
    const int start = starts[row], head = (head_of_keys * PARTS + part) * HEADS;
    const int count = SEVERAL < tokens - token ? SEVERAL : tokens - token, used = count * HEADS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool crowded = queries_shape[0] * GROUPS * PARTS * sets >= CROWD;
"""
"""Which tokens, heads and keys are the block's."""

_FETCH: Final = """
    const T* const old_key = held_keys + row * held_keys_strides[0] + head_of_keys * held_keys_strides[1];
    const T* const old_value = held_values + row * held_values_strides[0] + head_of_keys * held_values_strides[1];
    // From a line to the next: no array is that wide.
    const int next_key = held_keys_strides[2], next_value = held_values_strides[2];
    auto place = [](int position) { return RING > 0 ? position % RING : position; };
    auto line_of = [&](int i, int position) {
        return i < HALVES ? old_key + long(place(position)) * next_key : old_value + long(place(position)) * next_value;
    };
    auto whole = [](const T* lines, const auto& strides) {
        return strides[3] == 1 && strides[2] % 8 == 0 && reinterpret_cast<size_t>(lines) % 16 == 0;
    };
    const bool vectors = whole(old_key, held_keys_strides) && whole(old_value, held_values_strides);
    // The vectors of a tile that are the thread's: HALVES of keys, then as many of values.
    uint4* const ring_of = ring + warp * (STAGES * TILE * 32) + lane;
    auto key_of = [&](int i) { return i < HALVES ? g + i % 2 * 8 : 2 * t + i % 2 + i % 4 / 2 * 8; };
    auto vector_of = [&](int i) { return i < HALVES ? t + i / 2 * 4 : g + (i - HALVES) / 4 * 8; };
    // Lines before `begin`, at `end` and behind are zeros: what is there might be no numbers.
    auto fetch = [&](int round, int tile, int begin, int end) {
        uint4* const to = ring_of + round % STAGES * (TILE * 32);
        if (vectors) {
            #pragma unroll
            for (int i = 0; i < TILE; ++i) {
                const int p = tile * 16 + key_of(i);
                copy(to + i * 32, line_of(i, p) + vector_of(i) * 8, p >= begin && p < end);
            }
            return;
        }
        #pragma unroll 1
        for (int i = 0; i < TILE; ++i) {
            const int p = tile * 16 + key_of(i);
            const long step = i < HALVES ? held_keys_strides[3] : held_values_strides[3];
            const T* const from = line_of(i, p);
            T* const x = reinterpret_cast<T*>(to + i * 32);
            for (int e = 0; e < 8; ++e) x[e] = p >= begin && p < end ? from[(vector_of(i) * 8 + e) * step] : T(0.0f);
        }
    };
    // The first tile may have lines that are not written yet, or by another block right now: `complete` has its own.
    const bool early = WINDOW == 0 && (split == 0 || !crowded);
    if (early) fetch(0, split * WARPS + warp, 0, held_keys_shape[2]);

    const int least = start + token, at = least + count - 1;
    const int bottom = WINDOW > 0 && least >= WINDOW ? least - WINDOW + 1 : 0;
    const int low = bottom / 16, tiles = at / 16 + 1 - low;
    // A row has fewer blocks than it may have where that is all it is worth.
    constexpr int WORTH = SHARE > WARPS ? SHARE : WARPS;
    const int wanted = crowded ? (tiles + WORTH - 1) / WORTH : (tiles + WARPS - 1) / WARPS;
    const int blocks = wanted < splits ? wanted : splits;
    if (split >= blocks) {
        wait_for_groups<0>();
        return;
    }
    auto tile_of = [&](int round) { return (round * blocks + split) * WARPS + warp; };
    auto follow = [&](int round) {
        if (tile_of(round) < tiles) fetch(round, low + tile_of(round), bottom, start);
        close_group();
    };
    if (early) close_group();
    #pragma unroll 1
    for (int round = early ? 1 : 0; round < STAGES; ++round) follow(round);
"""

_NEW: Final = """
    // The block's queries, and the call's own keys and values up to its last token's, rotated as MLX's rope does it,
    // and rounded as there. A thread has a pair of columns of every AT_ONCE-th line; several are on their way at once.
    __shared__ uint4 asked_raw[LINES * (D / 8)], fresh_raw[2 * FEW * (D / 8)];
    T* const asked = reinterpret_cast<T*>(asked_raw);
    T* const fresh = reinterpret_cast<T*>(fresh_raw);
    {
        constexpr int PAIRS = D / 2, HALF = ROTATED / 2, AT_ONCE = THREADS / PAIRS, TOGETHER = 2;
        const int which = threadIdx.x % PAIRS, own = token + count, lines = used + 2 * own;
        const bool turned = which < HALF, halves = turned && !TRADITIONAL;
        const int first = halves ? which : which * 2, second = halves ? which + HALF : which * 2 + 1;
        const float frequency = turned ? frequencies[which] : 0.0f;
        const T* const query = queries + row * queries_strides[0] + head * queries_strides[1]
            + token * queries_strides[2];
        const T* const key = keys + row * keys_strides[0] + head_of_keys * keys_strides[1];
        const T* const value = values + row * values_strides[0] + head_of_keys * values_strides[1];
        const int apart = queries_strides[1];
        float sine = 0.0f, cosine = 1.0f;
        int known = -1;
        for (int base = threadIdx.x / PAIRS; base < lines; base += AT_ONCE * TOGETHER) {
            float x[TOGETHER], y[TOGETHER];
            #pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int n = base + i * AT_ONCE < lines ? base + i * AT_ONCE : lines - 1, of = n - used;
                const T* const from = of < 0 ? query + n % HEADS * apart + n / HEADS * int(queries_strides[2])
                    : of < own ? key + of * int(keys_strides[2]) : value + (of - own) * int(values_strides[2]);
                const int step = of < 0 ? queries_strides[3] : of < own ? keys_strides[3] : values_strides[3];
                x[i] = float(from[first * step]), y[i] = float(from[second * step]);
            }
            #pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int n = base + i * AT_ONCE, of = n - used;
                if (n >= lines || threadIdx.x >= AT_ONCE * PAIRS) continue;
                const int position = of < 0 ? least + n / HEADS : start + of;
                const bool turns = turned && of < own;
                if (turns && position != known) {
                    sincosf(float(position) * frequency, &sine, &cosine);
                    known = position;
                }
                T* const to = of < 0 ? asked + n * D : fresh + (of < own ? of : FEW + of - own) * D;
                to[first] = T(turns ? x[i] * cosine - y[i] * sine : x[i]);
                to[second] = T(turns ? x[i] * sine + y[i] * cosine : y[i]);
            }
        }
    }
    __syncthreads();

    // The planes are written in place: see attention_kernel.
    const int newest = start / 16 > low ? start / 16 - low : 0;
    if (part == 0 && (blocks == 1 || newest / WARPS % blocks == split)) {
        for (int i = threadIdx.x; i < count * D; i += THREADS) {
            const int of = token + i / D, column = i % D;
            const_cast<T*>(line_of(0, start + of))[column * held_keys_strides[3]] = fresh[of * D + column];
            const_cast<T*>(line_of(HALVES, start + of))[column * held_values_strides[3]] =
                fresh[(FEW + of) * D + column];
        }
    }
    // What is not held yet, into a tile that has come, and zeros behind it.
    auto complete = [&](int tile, uint4* to) {
        #pragma unroll 1
        for (int i = 0; i < TILE; ++i) {
            const int of = tile * 16 + key_of(i) - start;
            const uint4* const its = fresh_raw + ((i < HALVES ? 0 : FEW) + of) * (D / 8) + vector_of(i);
            if (of >= 0) to[i * 32] = of < token + count ? *its : uint4{0, 0, 0, 0};
        }
    };
"""

_ATTEND: Final = """
    // A thread has the columns of query `g` of each set, and then the scores and sums of queries 2 t and 2 t + 1.
    uint4 query[SETS][D / 32];
    float sum[SETS][D / 64][4][4], top[SETS][2], total[SETS][2];
    #pragma unroll
    for (int n = 0; n < SETS; ++n) {
        #pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            query[n][j] = n * 8 + g < used ? asked_raw[(n * 8 + g) * (D / 8) + t + j * 4] : uint4{0, 0, 0, 0};
        }
        #pragma unroll
        for (int i = 0; i < D / 4; ++i) sum[n][i / 16][i / 4 % 4][i % 4] = 0.0f;
        top[n][0] = top[n][1] = NONE;
        total[n][0] = total[n][1] = 0.0f;
    }
    for (int round = 0; tile_of(round) < tiles; ++round) {
        const int tile = low + tile_of(round);
        uint4* const here = ring_of + round % STAGES * (TILE * 32);
        wait_for_groups<STAGES - 1>();
        if (tile * 16 + 16 > start) complete(tile, here);
        float score[SETS][4];
        #pragma unroll
        for (int n = 0; n < SETS; ++n) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
        #pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            const uint4 upper = here[j * 64], lower = here[j * 64 + 32];
            #pragma unroll
            for (int n = 0; n < SETS; ++n) {
                multiply(score[n], upper.x, lower.x, upper.y, lower.y, query[n][j].x, query[n][j].y);
                multiply(score[n], upper.z, lower.z, upper.w, lower.w, query[n][j].z, query[n][j].w);
            }
        }

        const bool inner = tile * 16 + 15 <= least && (WINDOW == 0 || tile * 16 > at - WINDOW);
        bool higher = false;
        #pragma unroll
        for (int n = 0; n < SETS; ++n) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int p = tile * 16 + g + e / 2 * 8, limit = least + (n * 8 + t * 2 + e % 2) / HEADS;
                const bool seen = inner || (p <= limit && (WINDOW == 0 || p > limit - WINDOW));
                score[n][e] = seen ? score[n][e] * SCALE : NEVER;
                higher = higher || score[n][e] > top[n][e % 2] + 8.0f;
            }
        }
        if (__any_sync(0xffffffffu, higher)) {
            #pragma unroll
            for (int n = 0; n < SETS; ++n) {
                #pragma unroll
                for (int q = 0; q < 2; ++q) {
                    float best = score[n][q] > score[n][q + 2] ? score[n][q] : score[n][q + 2];
                    best = best > top[n][q] ? best : top[n][q];
                    #pragma unroll
                    for (int w = 4; w < 32; w <<= 1) {
                        const float other = __shfl_xor_sync(0xffffffffu, best, w);
                        best = other > best ? other : best;
                    }
                    const float kept = power_of_two(top[n][q] - best);
                    top[n][q] = best;
                    total[n][q] *= kept;
                    #pragma unroll
                    for (int i = 0; i < D / 8; ++i) sum[n][i / 8][i / 2 % 4][i % 2 * 2 + q] *= kept;
                }
            }
        }
        unsigned weight[SETS][2];
        #pragma unroll
        for (int n = 0; n < SETS; ++n) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[n][e] = power_of_two(score[n][e] - top[n][e % 2]);
                total[n][e % 2] += score[n][e];
            }
            weight[n][0] = transposed(pair(score[n][0], score[n][1]));
            weight[n][1] = transposed(pair(score[n][2], score[n][3]));
        }

        #pragma unroll
        for (int s = 0; s < D / 64; ++s) {
            uint4 value[4];
            #pragma unroll
            for (int m = 0; m < 4; ++m) value[m] = here[(HALVES + s * 4 + m) * 32];
            auto column = [&](const unsigned (&word)[4], float (&of)[SETS][D / 64][4][4], int w) {
                const unsigned a0 = __byte_perm(word[0], word[1], 0x5410), a1 = __byte_perm(word[0], word[1], 0x7632);
                const unsigned a2 = __byte_perm(word[2], word[3], 0x5410), a3 = __byte_perm(word[2], word[3], 0x7632);
                #pragma unroll
                for (int n = 0; n < SETS; ++n) {
                    multiply(of[n][s][w], a0, a1, a2, a3, weight[n][0], weight[n][1]);
                }
            };
            column({value[0].x, value[1].x, value[2].x, value[3].x}, sum, 0);
            column({value[0].y, value[1].y, value[2].y, value[3].y}, sum, 1);
            column({value[0].z, value[1].z, value[2].z, value[3].z}, sum, 2);
            column({value[0].w, value[1].w, value[2].w, value[3].w}, sum, 3);
        }
        follow(round + STAGES);
    }
"""

_MERGE: Final = """
    // A warp's sums go where its tiles were.
    __shared__ float tops[WARPS][LINES], totals[WARPS][LINES];
    constexpr int LONG = D + 2, APART = STAGES * TILE * 128;
    float* const sums = reinterpret_cast<float*>(ring);
    wait_for_groups<0>();
    __syncwarp();
    #pragma unroll
    for (int n = 0; n < SETS; ++n) {
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
            #pragma unroll
            for (int w = 4; w < 32; w <<= 1) total[n][q] += __shfl_xor_sync(0xffffffffu, total[n][q], w);
            const int line = n * 8 + t * 2 + q;
            if (line >= used) continue;
            if (g == 0) tops[warp][line] = top[n][q], totals[warp][line] = total[n][q];
            #pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                float2* const to = reinterpret_cast<float2*>(
                    sums + warp * APART + line * LONG + i / 4 * 64 + g * 8 + i % 4 * 2);
                *to = {sum[n][i / 4][i % 4][q], sum[n][i / 4][i % 4][q + 2]};
            }
        }
    }
    __syncthreads();
    T* const result = out + ((long(row) * tokens + token) * queries_shape[1] + head) * D;
    // Lines are the heads of a token, then those of the next.
    auto put = [&](int line, int column, float x, float y) {
        T* const to = result + (long(line / HEADS) * queries_shape[1] + line % HEADS) * D + column;
        *reinterpret_cast<unsigned*>(to) = pair(x, y);
    };
    // What a split has: for each query its sums, its highest score, and its total.
    float* const parts = partial + long(base_block) * splits * LINES * LONG;
    for (int i = threadIdx.x * 2; i < used * D; i += THREADS * 2) {
        const int line = i / D, column = i % D;
        float best = NONE, x = 0.0f, y = 0.0f, under = 0.0f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) best = tops[w][line] > best ? tops[w][line] : best;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float kept = power_of_two(tops[w][line] - best);
            const float2 its = *reinterpret_cast<const float2*>(sums + w * APART + line * LONG + column);
            x += kept * its.x, y += kept * its.y, under += kept * totals[w][line];
        }
        if (blocks == 1) {
            put(line, column, x / under, y / under);
        } else {
            float* const mine = parts + (split * LINES + line) * LONG;
            *reinterpret_cast<float2*>(mine + column) = {x, y};
            if (column == 0) *reinterpret_cast<float2*>(mine + D) = {best, under};
        }
    }
    if (blocks == 1) return;

    // The block that comes last puts the splits together, always in one order, and leaves the counter as it was.
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* const counter = const_cast<int*>(counters) + base_block;
        last = atomicAdd(counter, 1) == blocks - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    // All splits of a line are on their way at once.
    constexpr int MOST = 32;
    for (int i = threadIdx.x * 2; i < used * D; i += THREADS * 2) {
        const int line = i / D, column = i % D;
        const float* const of = parts + line * LONG;
        float best = NONE, x = 0.0f, y = 0.0f, under = 0.0f;
        for (int from = 0; from < blocks; from += MOST / 4) {
            float2 its[MOST / 4], tail[MOST / 4];
            #pragma unroll
            for (int s = 0; s < MOST / 4; ++s) {
                const float* const its_of = of + (from + s < blocks ? from + s : blocks - 1) * (LINES * LONG);
                its[s] = __ldcg(reinterpret_cast<const float2*>(its_of + column));
                tail[s] = __ldcg(reinterpret_cast<const float2*>(its_of + D));
            }
            #pragma unroll
            for (int s = 0; s < MOST / 4; ++s) {
                if (from + s >= blocks) continue;
                const float high = tail[s].x > best ? tail[s].x : best;
                const float kept = power_of_two(best - high), more = power_of_two(tail[s].x - high);
                x = x * kept + its[s].x * more, y = y * kept + its[s].y * more;
                under = under * kept + tail[s].y * more;
                best = high;
            }
        }
        put(line, column, x / under, y / under);
    }
"""

SOURCE: Final = _PLACE + _FETCH + _NEW + _ATTEND + _MERGE
