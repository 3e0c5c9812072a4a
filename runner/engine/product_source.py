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

BODY: Final = """
    const int K = w_shape[1], N = w_shape[0] / PARTS, chunks = K / 64;
    int rows = 1;
    #pragma unroll 1
    for (int i = 0; i + 1 < x_ndim; ++i) rows *= x_shape[i];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * (16 * MTILES / PARTS);

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
    constexpr int THREADS = WARPS * 32, EACH = (TILES * 128 + THREADS - 1) / THREADS, APART = STAGES * MTILES * 512;
    float* const sums = reinterpret_cast<float*>(ring);
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < MTILES * TILES * 4; ++i) {
        sums[warp * APART + i * 32 + lane] = sum[i / 4 / TILES][i / 4 % TILES][i % 4];
    }
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
        }
        #pragma unroll
        for (int m = 0; m < MTILES; m += PARTS) {
            const size_t to = size_t(r) * N + first + m / PARTS * 16 + n;
            STORE
        }
    }
"""

STORES: Final = {
    "plain": "out[to] = added_ndim == 1 ? T(total[m]) : T(float(added[to]) + float(T(total[m])));",
    "swiglu": "out[to] = swiglu(T(total[m]), T(total[m + 1]));",
}
"""What becomes of the sums."""
