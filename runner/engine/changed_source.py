"""What `product_source` becomes where each row has the low-rank change of its slot, in CUDA.

That is as in `adapters/kernel.py`: the rounded product, plus what the rank's inner products and `up` give, rounded. The
first blocks compute the inner products, RANKS of a row each, into `inner`, the room of a board (`RowSlots`). The others
meanwhile read their weights, and wait before what the sums become. They wait for blocks of a lower index only; blocks
start in the order of their index, so those run or have ended, whatever the number of multiprocessors, and need nothing
from those that wait. A board's counters are how many of the first have ended, and how many of the others have seen that
all have; the last to see it leaves both at zero. The order of an inner product depends on K and WARPS only.
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
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }
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
    const int shares = (R + RANKS - 1) / RANKS, before = rows * shares;
    int* const ready = const_cast<int*>(board);
    float* const inner = reinterpret_cast<float*>(ready + 32 + (board_shape[0] + 31) / 32 * 32);
    if (blockIdx.x < before) {
        // All ranks, those of other adapters included, which are zeros for this one: others wait for this block.
        const int row = blockIdx.x / shares, lowest = blockIdx.x % shares * RANKS, slot = slots[row / each];
        if (slot > 0) {
            const T* const own = down + (size_t(slot) * R + lowest) * K;
            const T* const token = x + size_t(row) * K;
            // A warp takes a rank, or, where there are more warps than ranks, an equal part of its product.
            constexpr int SPLITS = WARPS > RANKS ? WARPS / RANKS : 1;
            const int ranks = min(R - lowest, RANKS);
            float* const partial = reinterpret_cast<float*>(ring);
            for (int from = 0; from < RANKS * SPLITS; from += WARPS) {
                const int item = from + warp, rank = item / SPLITS, split = item % SPLITS;
                float sum = 0.0f;
                if (rank < ranks) {
                    #pragma unroll 8
                    for (int k = (split * 32 + lane) * 8; k < K; k += SPLITS * 256) {
                        const uint4 left = *reinterpret_cast<const uint4*>(token + k);
                        const uint4 right = *reinterpret_cast<const uint4*>(own + size_t(rank) * K + k);
                        const T* const l = reinterpret_cast<const T*>(&left);
                        const T* const m = reinterpret_cast<const T*>(&right);
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) sum += float(l[i]) * float(m[i]);
                    }
                }
                #pragma unroll
                for (int width = 16; width > 0; width >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, width);
                if (lane == 0 && rank < ranks) partial[item] = sum;
            }
            __syncthreads();
            if (threadIdx.x < ranks) {
                float sum = 0.0f;
                for (int split = 0; split < SPLITS; ++split) sum += partial[threadIdx.x * SPLITS + split];
                inner[row * R + lowest + threadIdx.x] = sum;
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(ready, 1);
        }
        return;
    }
""",
    "BLOCK": "(blockIdx.x - before)",
    "SEEK": """
    // What the changes need of `up` comes into the cache that all blocks share, while the weights do.
    for (int at = threadIdx.x; at < TILES * 128; at += THREADS) {
        const int r = at / 16, m = at % 16;
        if (r >= rows || m >= MTILES) continue;
        const int slot = slots[r / each], output = first + m / PARTS * 16 + m % PARTS * N;
        const int* span = spans + slot * 32;
        #pragma unroll 1
        while (span[0] <= output) span += 3;
        #pragma unroll 1
        for (int i = span[1]; i < span[2]; ++i) prefetch(up + (size_t(slot) * R + i) * O + output);
    }
""",
    "WAIT": """
    int slot[EACH], low[EACH][MTILES], high[EACH][MTILES];
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int r = (threadIdx.x + e * THREADS) / 16;
        slot[e] = r < rows ? slots[r / each] : 0;
        #pragma unroll
        for (int m = 0; m < MTILES; ++m) {
            // A span (Stack.spans) is where a part's outputs end and the ranks [low, high) that reach them.
            const int* span = spans + slot[e] * 32;
            #pragma unroll 1
            while (span[0] <= first + m / PARTS * 16 + m % PARTS * N) span += 3;
            low[e][m] = span[1], high[e][m] = span[2];
        }
    }
    if (threadIdx.x == 0) {
        while (acquire(ready) < before) {}
    }
""",
    "CHANGE": """
            float changed = float(T(total[m]));
            const float* const own = inner + r * R;
            const T* const line = up + size_t(slot[e]) * R * O + first + m / PARTS * 16 + m % PARTS * N + n;
            // Several ranks' values are on their way at once.
            for (int from = low[e][m]; from < high[e][m]; from += 8) {
                float left[8], right[8];
                #pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int rank = min(from + i, high[e][m] - 1);
                    left[i] = __ldcg(own + rank);
                    right[i] = float(line[size_t(rank) * O]);
                }
                #pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (from + i < high[e][m]) changed += left[i] * right[i];
                }
            }
            total[m] = changed;
""",
    "DONE": """
    if (threadIdx.x == 0 && atomicAdd(ready + 1, 1) == O / (16 * MTILES) - 1) ready[0] = ready[1] = 0;
""",
}
