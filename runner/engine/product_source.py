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
are constants; `tensor_cores` has what only a GPU can do. `changed_source` makes another kernel of it, in which each row
has the low-rank change of its slot.
"""

from __future__ import annotations

from typing import Final

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

PLAIN: Final = {"BEFORE": "", "BLOCK": "blockIdx.x", "SEEK": "", "WAIT": "", "CHANGE": "", "DONE": ""}
"""What stands at these places of BODY."""
