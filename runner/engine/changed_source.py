"""What `product_source` becomes where each row has the low-rank change of its slot, in CUDA.

That is as in `adapters/kernel.py`: the rounded product, plus what the rank's inner products and `up` give, rounded. The
first blocks, as many as there are multiprocessors, compute the inner products, a few each, while their weights are on
the way, and leave them in `inner`, the room of a board (`RowSlots`). There are no blocks for that alone: with those the
grid had more than run at once, and the last ones began when the product could have been done. All wait for inner
products before what the sums become, though not for ever: who waits for a block that does not run, on a device that
others use as well, computes them all by itself, to the same bits. The order of an inner product depends on K and WARPS
only.

A board's counters are how many of the first blocks have left theirs, and how many blocks have seen that all have; the
last to see it leaves both at zero.
"""

from __future__ import annotations

from typing import Final

CHANGED_DEVICE: Final = """
// What other blocks have written before they wrote this is seen then.
__device__ inline int acquire(const int* from) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
// The same for what is read past the first cache, which an acquiring load would empty, tokens and all.
__device__ inline int peek(const int* from) {
    int v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
// One more; what this thread, and those that it has met, have written before is seen by then.
__device__ inline void count(int* at) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(at) : "memory"); }
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }
__device__ inline int multiprocessors() {
    int v;
    asm("mov.u32 %0, %%nsmid;" : "=r"(v));
    return v;
}
// How often it is looked for what another block leaves: some hundreds of microseconds.
constexpr int PATIENCE = 512;
"""

UNPACK: Final = """
    // Stack.packed and RowSlots.boards. A span is where a part's outputs end and the ranks [low, high) that reach them.
    const int S = changes_shape[0], R = (changes_shape[1] - 64) / (K + O), each = rows / board_shape[0];
    const int* const slots = board + 32;
    const int* const spans = reinterpret_cast<const int*>(changes);
    const T* const down = changes + size_t(S) * 64;
    const T* const up = down + size_t(S) * R * K;
"""
"""What a launch with changes finds in its arrays: of `rows` tokens with K values, and O outputs."""

CHANGED: Final = {
    "BEFORE": """
    const int O = N * PARTS;
"""
    + UNPACK
    + """
    constexpr int AHEAD = 8, SPLITS = WARPS >= 16 ? 8 : WARPS >= 8 ? 2 : 1, AT_ONCE = WARPS / SPLITS;
    const int blocks = O / (16 * MTILES), items = rows * R;
    const int working = FRONT > 0 ? FRONT : min(blocks, multiprocessors());
    int* const ready = const_cast<int*>(board);
    float* const inner = reinterpret_cast<float*>(ready + 32 + (board_shape[0] + 31) / 32 * 32);
    __shared__ int known, own_slot[TILES * 8], low[TILES * 8 * MTILES], high[TILES * 8 * MTILES];
    __shared__ float partial[WARPS], products[TILES * 8 * MTILES * AHEAD];
    // A part of an inner product. All ranks, those of other adapters included, which are zeros for this one.
    auto piece = [&](int item, int split) {
        float sum = 0.0f;
        const int row = item / R, its = item < items ? slots[row / each] : 0;
        if (its > 0) {
            const T* const token = x + size_t(row) * K;
            const T* const own = down + (size_t(its) * R + item % R) * K;
            #pragma unroll 4
            for (int k = (split * 32 + lane) * 8; k < K; k += SPLITS * 256) {
                const uint4 left = *reinterpret_cast<const uint4*>(token + k);
                const uint4 right = *reinterpret_cast<const uint4*>(own + k);
                const T* const l = reinterpret_cast<const T*>(&left);
                const T* const m = reinterpret_cast<const T*>(&right);
                #pragma unroll
                for (int i = 0; i < 8; ++i) sum += float(l[i]) * float(m[i]);
            }
        }
        #pragma unroll
        for (int width = 16; width > 0; width >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, width);
        return sum;
    };
    auto share = [&]() {
        const int per = (items + working - 1) / working, from = blockIdx.x * per, until = min(from + per, items);
        for (int begin = from; begin < until; begin += AT_ONCE) {
            const int item = begin + warp / SPLITS;
            const float sum = piece(item < until ? item : items, warp % SPLITS);
            if (lane == 0) partial[warp] = sum;
            __syncthreads();
            if (threadIdx.x < AT_ONCE && begin + threadIdx.x < until) {
                float total = 0.0f;
                for (int split = 0; split < SPLITS; ++split) total += partial[threadIdx.x * SPLITS + split];
                inner[begin + threadIdx.x] = total;
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) count(ready);
    };
    if (FRONT > 0 && blockIdx.x < FRONT) {
        share();
        return;
    }
    // The last warp finds out what the rows need; its loads are on their way while others are waited for.
    const bool seeking = warp == WARPS - 1 && lane < TILES * 8;
    const int mine = seeking && lane < rows ? slots[lane / each] : 0;
""",
    "BLOCK": "(int(blockIdx.x) - FRONT)",
    "SEEK": """
    uint4 parts[3];
    if (seeking) {
        #pragma unroll
        for (int i = 0; i < 3; ++i) parts[i] = reinterpret_cast<const uint4*>(spans + mine * 32)[i];
    }
    if (FRONT == 0 && blockIdx.x < working) share();
    if (seeking) {
        own_slot[lane] = mine;
        #pragma unroll
        for (int m = 0; m < MTILES; ++m) {
            const int output = first + m / PARTS * 16 + m % PARTS * N;
            const unsigned words[12] = {parts[0].x, parts[0].y, parts[0].z, parts[0].w, parts[1].x, parts[1].y,
                                        parts[1].z, parts[1].w, parts[2].x, parts[2].y, parts[2].z, parts[2].w};
            int begins = -1, ends = 0;
            #pragma unroll
            for (int part = 0; part < 4; ++part) {
                if (begins >= 0 || output >= int(words[part * 3])) continue;
                begins = words[part * 3 + 1], ends = words[part * 3 + 2];
            }
            if (begins < 0) {
                const int* span = spans + mine * 32 + 12;
                #pragma unroll 1
                while (span[0] <= output) span += 3;
                begins = span[1], ends = span[2];
            }
            if (lane >= rows) ends = begins;
            low[lane * MTILES + m] = begins, high[lane * MTILES + m] = ends;
            // What the changes need of `up` comes into the cache that all blocks share, while the weights do.
            #pragma unroll 1
            for (int i = begins; i < ends; ++i) prefetch(up + (size_t(mine) * R + i) * O + output);
        }
    }
    int looked = 0;
""",
    "LOOK": """
        if (threadIdx.x == 0 && round == rounds - 1) looked = peek(ready);
""",
    "WAIT": """
    if (threadIdx.x == 0) known = looked;
""",
    "MEET": """
    T right[EACH][MTILES][AHEAD];
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int n = (threadIdx.x + e * THREADS) % 16, r = (threadIdx.x + e * THREADS) / 16;
        if (r >= rows || r >= TILES * 8) continue;
        #pragma unroll
        for (int m = 0; m < MTILES; ++m) {
            const int from = low[r * MTILES + m], until = high[r * MTILES + m];
            if (from >= until) continue;
            const T* const line = up + size_t(own_slot[r]) * R * O + first + m / PARTS * 16 + m % PARTS * N + n;
            #pragma unroll
            for (int i = 0; i < AHEAD; ++i) right[e][m][i] = line[size_t(min(from + i, until - 1)) * O];
        }
    }
    if (known < working) {
        __syncthreads();
        if (threadIdx.x == 0) {
            int found = 0;
            #pragma unroll 1
            for (int times = 0; times < PATIENCE && found < working; ++times) found = acquire(ready);
            known = found;
        }
        __syncthreads();
        if (known < working) {
            #pragma unroll 1
            for (int item = warp; item < items; item += WARPS) {
                float total = 0.0f;
                #pragma unroll 1
                for (int split = 0; split < SPLITS; ++split) total += piece(item, split);
                if (lane == 0) inner[item] = total;
            }
            __syncthreads();
        }
    }
    for (int at = threadIdx.x; at < rows * MTILES * AHEAD; at += THREADS) {
        const int its = at / AHEAD, rank = low[its] + at % AHEAD;
        products[at] = rank < high[its] ? __ldcg(inner + its / MTILES * R + rank) : 0.0f;
    }
    int seen = 0;
    if (threadIdx.x == 0) seen = atomicAdd(ready + 1, 1);
    __syncthreads();
""",
    "CHANGE": """
            float changed = float(T(total[m]));
            const int its = r * MTILES + m, from = low[its], until = high[its];
            #pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (from + i < until) changed += products[its * AHEAD + i] * float(right[e][m][i]);
            }
            const T* const line = up + size_t(own_slot[r]) * R * O + first + m / PARTS * 16 + m % PARTS * N + n;
            #pragma unroll 4
            for (int rank = from + AHEAD; rank < until; ++rank) {
                changed += __ldcg(inner + r * R + rank) * float(line[size_t(rank) * O]);
            }
            total[m] = changed;
""",
    "DONE": """
    if (threadIdx.x == 0 && seen == blocks - 1) ready[0] = ready[1] = 0;
""",
}
