"""What `product_source` becomes where each row has the low-rank change of its slot, in CUDA.

The change is more of the product: behind a token's K values come its inner products with `down` of all slots, zeros but
for those of its own, and behind a line of the weight what all slots' `up` have for that output (`Stack.turned`). So it
is read as the weight is, ahead of time, and what comes after the sums is as it was; a row without a change has the same
bits as without any of this, and inner products are of the tokens' type, as upstream's are.

The first blocks, as many as there are multiprocessors, compute the inner products, a few each, while their weights are
on the way, and leave them in the room of a board (`RowSlots`). There are no blocks for that alone: with those the grid
had more than run at once, and the last ones began when the product could have been done. A warp waits for them before
it reads them, though not for ever: who waits for a block that does not run, on a device that others use as well,
computes what it needs by itself, to the same bits. The order of an inner product depends on K and WARPS only.

A board's counters are how many of the first blocks have left theirs, and how often it was seen that all have; the last
to see it leaves both at zero.
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
__device__ inline uint4 fresh(const void* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
// One more; what this thread, and those that it has met, have written before is seen by then.
__device__ inline void count(int* at) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(at) : "memory"); }
// The same, which the compiler does not know.
__device__ inline int hidden(int v) { asm volatile("" : "+r"(v)); return v; }
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

_PIECE: Final = """
    // A part of an inner product of a token, with a line of `down`, or none.
    auto NAME = [&](int row, int line, int split) {
        float sum = 0.0f;
        if (line >= 0) {
            const T* const token = x + size_t(row) * K;
            const T* const own = down + size_t(line) * K;
            #pragma unroll TIMES
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
"""

CHANGED: Final = {
    "BEFORE": """
    const int O = N * PARTS;
"""
    + UNPACK
    + """
    constexpr int SPLITS = WARPS >= 16 ? 8 : WARPS >= 8 ? 2 : 1, AT_ONCE = WARPS / SPLITS;
    const int blocks = O / (16 * MTILES), working = min(blocks, multiprocessors()), items = rows * R;
    const int E = turned_shape[1], more = E / 32;
    int* const ready = const_cast<int*>(board);
    // [rows, E]
    T* const inner = reinterpret_cast<T*>(ready + 32 + (board_shape[0] + 31) / 32 * 32);
    __shared__ float partial[WARPS];
"""
    + _PIECE.replace("NAME", "piece").replace("TIMES", "4"),
    "SEEK": """
    // Lines of `turned` come into the cache that all blocks share while the weights do.
    #pragma unroll 1
    for (int i = threadIdx.x; i < 16 * MTILES * more; i += THREADS) {
        const int line = i / more, m = line / 16;
        prefetch(turned + size_t(first + m / PARTS * 16 + m % PARTS * N + line % 16) * E + i % more * 32);
    }
    if (blockIdx.x < working) {
        const int per = (items + working - 1) / working, from = blockIdx.x * per, until = min(from + per, items);
        for (int begin = from; begin < until; begin += AT_ONCE) {
            const int item = min(begin + warp / SPLITS, until - 1);
            const int taken = slots[item / R / each];
            const float sum = piece(item / R, taken > 0 ? taken * R + item % R : -1, warp % SPLITS);
            if (lane == 0) partial[warp] = sum;
            __syncthreads();
            if (threadIdx.x < AT_ONCE && begin + threadIdx.x < until) {
                const int mine = begin + threadIdx.x, row = mine / R, rank = mine % R, its = slots[row / each];
                float total = 0.0f;
                for (int split = 0; split < SPLITS; ++split) total += partial[threadIdx.x * SPLITS + split];
                #pragma unroll 4
                for (int slot = 0; slot < S; ++slot) {
                    inner[row * E + slot * R + rank] = T(slot == its ? total : 0.0f);
                }
                for (int i = S * R + rank; i < E; i += R) inner[row * E + i] = T(0.0f);
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) count(ready);
    }
    int looked = 0;
""",
    "PEEK": """
        looked = peek(ready);
""",
    "MORE": """
    // What is known of before is found out again: kept meanwhile, it would take registers from what is read ahead.
    bool last = false;
    auto line_of = [&](int i, int chunk, int thread) {
        const int output = first + i / 2 / PARTS * 16 + i / 2 % PARTS * N + thread / 4 + i % 2 * 8;
        return turned + size_t(output) * E + chunk * 32 + thread % 4 * 8;
    };
    #pragma unroll 1
    for (int chunk = hidden(threadIdx.x) / 32; chunk < more; chunk += WARPS) {
        const int thread = hidden(threadIdx.x) % 32;
        uint4 a[MTILES][2];
        #pragma unroll
        for (int i = 0; i < MTILES * 2; ++i) a[i / 2][i % 2] = load(line_of(i, chunk, thread), true);
        if (thread == 0) {
            #pragma unroll 1
            for (int times = 0; times < PATIENCE && looked < working; ++times) looked = acquire(ready);
        }
        looked = __shfl_sync(0xffffffff, looked, 0);
        if (looked < working) {
            PIECE
            #pragma unroll 1
            for (int row = 0; row < rows; ++row) {
                const int ranks = (changes_shape[1] - 64) / (hidden(K) + O);
                const int first_line = slots[row / (rows / board_shape[0])] * ranks;
                inner[row * E + chunk * 32 + thread] = T(0.0f);
                __syncwarp();
                const int begin = max(first_line, chunk * 32), end = min(first_line + ranks, chunk * 32 + 32);
                #pragma unroll 1
                for (int line = begin; first_line > 0 && line < end; ++line) {
                    float total = 0.0f;
                    #pragma unroll 1
                    for (int split = 0; split < SPLITS; ++split) total += one_by_one(row, line, split);
                    if (thread == 0) inner[row * E + line] = T(total);
                }
            }
            __syncwarp();
        }
        if (thread == 0) last |= atomicAdd(ready + 1, 1) == blocks * more - 1;
        #pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int row = i * 8 + thread / 4;
            b[0][i] = fresh(inner + (row < rows ? row : rows - 1) * E + chunk * 32 + thread % 4 * 8);
        }
        #pragma unroll
        for (int m = 0; m < MTILES; ++m) {
            const uint4 low = a[m][0], high = a[m][1];
            #pragma unroll
            for (int i = 0; i < TILES; ++i) {
                multiply(sum[m][i], low.x, high.x, low.y, high.y, b[0][i].x, b[0][i].y);
                multiply(sum[m][i], low.z, high.z, low.w, high.w, b[0][i].z, b[0][i].w);
            }
        }
    }
""".replace("PIECE", _PIECE.replace("NAME", "one_by_one").replace("TIMES", "1")),
    "DONE": """
    if (last) ready[0] = ready[1] = 0;
""",
}
