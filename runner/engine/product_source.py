"""The source of `product_kernel`, in CUDA.

A block computes 16 · MTILES outputs of up to 8 · TILES rows. Its WARPS share K: each takes every WARPS-th chunk of 64
inputs, and their sums are added in the order of the warps. So the order of a sum depends on WARPS and K only, and a
row's result is the same bits whatever rows are beside it.

The weights are the tensor cores' 16 × 16 operand, the tokens their 16 × 8 one. Which inputs such a product takes first
does not matter as long as both take the same: so a thread takes 16 bytes of a line, 8 inputs, where the operand's
order would have four pieces of 4 bytes, and uses them in two products. Weights are copied into shared memory STAGES
chunks ahead, past the first cache, which keeps the tokens for the blocks that come after. (Loads into registers are
not: the compiler moves them down to where they are used, and a warp waits for each.)

T, WARPS, STAGES, MTILES, TILES and PARTS (how many weights follow each other in `w`: a gate and its input are two)
are constants. DEVICE is what only a GPU can do; tests on the host have their own in its place.

CHANGED makes another kernel of it, in which each row has the low-rank change of its slot (`adapters/kernel.py`: the
rounded product, plus what the rank's inner products and `up` give, rounded). Its first blocks compute the inner
products, RANKS of a row each, into `inner`, the room of a board (`RowSlots`). The others meanwhile read their weights,
and wait before what the sums become. They wait for blocks of a lower index only; blocks start in the order of their
index, so those run or have ended, whatever the number of multiprocessors, and need nothing from those that wait. A
board's counters are how many of the first have ended, and how many of the others have seen that all have; the last to
see it leaves both at zero. The order of an inner product depends on K and WARPS only.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
extern __shared__ uint4 ring[];

// Starts a copy of 16 bytes into shared memory, or of zeros.
__device__ inline void copy(uint4* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but those of the latest groups.
template <int LATEST> __device__ inline void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LATEST) : "memory");
}

__device__ inline uint4 load(const void* from, bool there) {
    uint4 v;
    asm("{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(from), "r"(int(there)));
    return v;
}

// sum += a · b, of a warp: a's lines g and g + 8 at two places, b's column g (PTX ISA, mma.m16n8k16).
__device__ inline void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""

SWIGLU: Final = """
// MLX's sigmoid, product and product, each rounded as there.
__device__ inline T swiglu(T gate, T up) {
    const T e = hexp(T(fabsf(float(gate))));
    const T y = T(1.0f / float(T(1.0f + float(e))));
    const T sigmoid = float(gate) < 0.0f ? y : T(1.0f - float(y));
    return T(float(T(float(gate) * float(sigmoid))) * float(up));
}
"""

GATE: Final = """
    const int N = y_shape[y_ndim - 1] / 2;
    int vectors = N / 8;
    for (int i = 0; i + 1 < y_ndim; ++i) vectors *= y_shape[i];
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= vectors) return;
    const T* const from = y + size_t(i / (N / 8)) * 2 * N + i % (N / 8) * 8;
    const uint4 left = *reinterpret_cast<const uint4*>(from), right = *reinterpret_cast<const uint4*>(from + N);
    const T* const gate = reinterpret_cast<const T*>(&left);
    const T* const up = reinterpret_cast<const T*>(&right);
    uint4 result;
    T* const written = reinterpret_cast<T*>(&result);
    #pragma unroll
    for (int e = 0; e < 8; ++e) written[e] = swiglu(gate[e], up[e]);
    *reinterpret_cast<uint4*>(out + size_t(i) * 8) = result;
"""
"""What follows a product of an MLP's gate and input, eight outputs a thread."""

BODY: Final = """
    const int K = w_shape[1], N = w_shape[0] / PARTS, chunks = K / 64;
    int rows = 1;
    #pragma unroll 1
    for (int i = 0; i + 1 < x_ndim; ++i) rows *= x_shape[i];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    BEFORE
    const int first = BLOCK * (16 * MTILES / PARTS);

    const T* lines[MTILES];
    #pragma unroll
    for (int m = 0; m < MTILES; ++m) lines[m] = w + size_t(first + m / PARTS * 16 + m % PARTS * N + g) * K + t * 8;
    const T* tokens[TILES];
    #pragma unroll
    for (int i = 0; i < TILES; ++i) {
        // Rows that are not there are the last one again; nobody looks at what they give.
        const int row = i * 8 + g;
        tokens[i] = x + size_t(row < rows ? row : rows - 1) * K + t * 8;
    }

    float sum[MTILES][TILES][4];
    #pragma unroll
    for (int m = 0; m < MTILES; ++m) {
        #pragma unroll
        for (int i = 0; i < TILES; ++i) sum[m][i][0] = sum[m][i][1] = sum[m][i][2] = sum[m][i][3] = 0.0f;
    }
    // A thread reads what it has copied itself, so nobody waits for others. All warps go round equally often: behind
    // the last chunk are zeros.
    const int rounds = (chunks + WARPS - 1) / WARPS;
    uint4* const own = ring + warp * (STAGES * MTILES * 128) + lane;
    auto fetch = [&](int round) {
        const int chunk = round * WARPS + warp;
        if (round < rounds) {
            #pragma unroll
            for (int i = 0; i < MTILES * 4; ++i) {
                const T* from = lines[i / 4] + i % 4 / 2 * 8 * K + chunk * 64 + i % 2 * 32;
                copy(own + (round % STAGES * MTILES * 4 + i) * 32, from, chunk < chunks);
            }
        }
        close_group();
    };
    // What the tokens have for a round is loaded in the one before.
    uint4 b[2][TILES];
    auto look = [&](int round) {
        const int chunk = round * WARPS + warp;
        #pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            b[i % 2][i / 2] = load(tokens[i / 2] + chunk * 64 + i % 2 * 32, chunk < chunks);
        }
    };
    #pragma unroll
    for (int round = 0; round < STAGES; ++round) fetch(round);
    look(0);
    constexpr int THREADS = WARPS * 32, EACH = (TILES * 128 + THREADS - 1) / THREADS, APART = STAGES * MTILES * 512;
    SEEK
    for (int round = 0; round < rounds; ++round) {
        wait_for_groups<STAGES - 1>();
        const uint4* const a = own + round % STAGES * MTILES * 128;
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            #pragma unroll
            for (int m = 0; m < MTILES; ++m) {
                const uint4 low = a[(m * 4 + h) * 32], high = a[(m * 4 + 2 + h) * 32];
                #pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    multiply(sum[m][i], low.x, high.x, low.y, high.y, b[h][i].x, b[h][i].y);
                    multiply(sum[m][i], low.z, high.z, low.w, high.w, b[h][i].z, b[h][i].w);
                }
            }
        }
        fetch(round + STAGES);
        look(round + 1);
    }

    // A warp's sums go where its weights were.
    float* const sums = reinterpret_cast<float*>(ring);
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < MTILES * TILES * 4; ++i) {
        sums[warp * APART + i * 32 + lane] = sum[i / 4 / TILES][i / 4 % TILES][i % 4];
    }
    WAIT
    __syncthreads();
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int at = threadIdx.x + e * THREADS, n = at % 16, r = at / 16;
        if (r >= rows || r >= TILES * 8) continue;
        // Where a warp has output n of row r.
        const int place = ((r / 8 * 2 + n / 8) * 2 + r % 2) * 32 + n % 8 * 4 + r % 8 / 2;
        float total[MTILES];
        #pragma unroll
        for (int m = 0; m < MTILES; ++m) {
            total[m] = 0.0f;
            #pragma unroll
            for (int v = 0; v < WARPS; ++v) total[m] += sums[v * APART + m * TILES * 128 + place];
            CHANGE
        }
        #pragma unroll
        for (int m = 0; m < MTILES; m += PARTS) {
            const size_t to = size_t(r) * N + first + m / PARTS * 16 + n;
            STORE
        }
    }
    DONE
"""

STORES: Final = {
    "plain": "out[to] = added_ndim == 1 ? T(total[m]) : T(float(added[to]) + float(T(total[m])));",
    "swiglu": "out[to] = swiglu(T(total[m]), T(total[m + 1]));",
}
"""What becomes of the sums."""

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

PLAIN: Final = {"BEFORE": "", "BLOCK": "blockIdx.x", "SEEK": "", "WAIT": "", "CHANGE": "", "DONE": ""}
"""What stands at these places of BODY."""

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
