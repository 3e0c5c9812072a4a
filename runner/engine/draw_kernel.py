"""A draw for every row in one launch on CUDA: filters, noise and choice.

In separate operations a step of 128 rows and 128,000 tokens spends most of its sampling in a sort of all logits, whose
result is one threshold a row. Here a block of threads takes one row and finds its thresholds by a radix search: four
bits of the logit's order-preserving bit pattern at a time, it sums what lies above (probabilities for top_p, tokens for
top_k) in each of the sixteen next parts, and goes on within the part where the sum is reached. No sum depends on the
order in which threads come, so equal logits give equal tokens. Then noise is made for the tokens that are left only:
the same noise, by token id, as in `runner.engine.draw`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import mlx.core as mx

from runner.engine import cuda_kernels

SWITCH: Final = "MLX_RUN_DRAW_KERNEL"
"""Environment variable that turns the kernel off, with 0."""

THREADS: Final = 1024

HEADER: Final = """
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct Best { float value; int index; };

__device__ inline bool better(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The order of floats as the order of unsigned integers; -0 is 0.
__device__ inline unsigned rank_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

// Threefry-2x32 with 20 rounds, as mlx.core.random has it.
__device__ inline void threefry(unsigned k0, unsigned k1, unsigned& x, unsigned& y) {
    const unsigned ks[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
    const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    x += ks[0];
    y += ks[1];
    #pragma unroll
    for (int i = 0; i < 5; ++i) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = rotations[i % 2][j];
            x += y;
            y = (y << r) | (y >> (32 - r));
            y ^= x;
        }
        x += ks[(i + 1) % 3];
        y += ks[(i + 2) % 3] + i + 1;
    }
}

__device__ inline float gumbel(unsigned bits) {
    const float uniform = fminf(float(bits) * 2.3283064365386963e-10f, 0.99999994f);
    return -logf(-logf(uniform));
}
"""

SOURCE: Final = """
    const int V = logits_shape[2];
    const int row = blockIdx.x;
    const T* l = logits + size_t(row) * V;
    const float* setting = settings + (row / logits_shape[1]) * 4;
    const float inverse = setting[0];
    const int me = threadIdx.x, lane = me & 31, warp = me >> 5;
    constexpr int WARPS = (THREADS + 31) / 32;
    __shared__ float sums[WARPS * 16];
    __shared__ float total[16];
    __shared__ Best bests[WARPS];

    // Sixteen sums over all threads, into `total`, in an order that is always the same.
    auto add_up = [&](float (&mine)[16]) {
        #pragma unroll
        for (int j = 0; j < 16; ++j) {
            if (THREADS > 1) {
                #pragma unroll
                for (int width = 16; width > 0; width >>= 1) mine[j] += __shfl_xor_sync(0xffffffffu, mine[j], width);
            }
            if (lane == 0) sums[warp * 16 + j] = mine[j];
        }
        __syncthreads();
        for (int j = me; j < 16; j += THREADS) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; ++w) sum += sums[w * 16 + j];
            total[j] = sum;
        }
        __syncthreads();
    };
    auto add_up_one = [&](float mine) {
        float several[16] = {mine};
        add_up(several);
        return total[0];
    };
    auto best_of = [&](Best mine) {
        if (THREADS > 1) {
            #pragma unroll
            for (int width = 16; width > 0; width >>= 1) {
                Best other;
                other.value = __shfl_xor_sync(0xffffffffu, mine.value, width);
                other.index = __shfl_xor_sync(0xffffffffu, mine.index, width);
                if (better(other, mine)) mine = other;
            }
        }
        if (lane == 0) bests[warp] = mine;
        __syncthreads();
        Best found = bests[0];
        for (int w = 1; w < WARPS; ++w) if (better(bests[w], found)) found = bests[w];
        __syncthreads();
        return found;
    };

    Best most = {-INFINITY, 0};
    for (int i = me; i < V; i += THREADS) {
        const Best here = {float(l[i]), i};
        if (here.value > most.value) most = here;
    }
    most = best_of(most);
    if (inverse == 0.0f) {
        if (me == 0) out[row] = most.index;
        return;
    }

    // The least rank such that the weight of all that is above it is less than `target`; `above` is that weight.
    auto search = [&](auto weight, float target, float& above) {
        unsigned found = 0;
        above = 0.0f;
        for (int shift = 28; shift >= LEAST_SHIFT; shift -= 4) {
            float parts[16];
            #pragma unroll
            for (int j = 0; j < 16; ++j) parts[j] = 0.0f;
            for (int i = me; i < V; i += THREADS) {
                const float x = float(l[i]);
                const unsigned rank = rank_of(x);
                // The shifts are two, since one by 32 is not defined.
                if (((rank >> shift) >> 4) != ((found >> shift) >> 4)) continue;
                const float w = weight(x);
                const unsigned part = (rank >> shift) & 15u;
                #pragma unroll
                for (int j = 0; j < 16; ++j) parts[j] += part == j ? w : 0.0f;
            }
            add_up(parts);
            int part = 15;
            while (part > 0 && above + total[part] < target) above += total[part--];
            found |= unsigned(part) << shift;
        }
        return found;
    };
    const float largest = most.value;
    auto probability = [&](float x) { return expf(x - largest); };
    auto one = [](float) { return 1.0f; };

    unsigned least = 1u;
    const float top_p = setting[1];
    if (top_p < 1.0f) {
        float mine = 0.0f, above;
        for (int i = me; i < V; i += THREADS) mine += probability(float(l[i]));
        // The most likely token stays, whatever top_p is.
        least = search(probability, fmaxf(top_p * add_up_one(mine), 1e-30f), above);
    }
    if (setting[2] > -INFINITY) least = max(least, rank_of(largest + setting[2]));
    const int top_k = int(setting[3]);
    int last_equal = V;
    unsigned kth = 0;
    auto is_kth = [&](unsigned rank) { return rank >> LEAST_SHIFT == kth >> LEAST_SHIFT; };
    if (top_k < V) {
        float mine = 0.0f, above;
        kth = search(one, float(top_k), above);
        least = max(least, kth);
        for (int i = me; i < V; i += THREADS) mine += is_kth(rank_of(float(l[i]))) ? 1.0f : 0.0f;
        const int room = top_k - int(above);
        if (room < int(add_up_one(mine))) {
            // Of equals the first stay in: the least index up to which there are as many as there is room for.
            int low = 0, high = V - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                float upto = 0.0f;
                for (int i = me; i <= middle; i += THREADS) upto += is_kth(rank_of(float(l[i]))) ? 1.0f : 0.0f;
                if (int(add_up_one(upto)) >= room) high = middle; else low = middle + 1;
            }
            last_equal = low;
        }
    }

    auto stays = [&](float x, int i) {
        const unsigned rank = rank_of(x);
        return rank >= least && x > -INFINITY && !(i > last_equal && is_kth(rank));
    };
    const int half = (V + 1) / 2;
    Best drawn = {-INFINITY, most.index};
    for (int i = me; i < half; i += THREADS) {
        const float x = float(l[i]), y = i + half < V ? float(l[i + half]) : -INFINITY;
        const bool first = stays(x, i), second = stays(y, i + half);
        if (!first && !second) continue;
        unsigned a = i, b = i + half;
        threefry(keys[row * 2], keys[row * 2 + 1], a, b);
        const Best left = {x * inverse + gumbel(a), i};
        const Best right = {y * inverse + gumbel(b), i + half};
        if (first && better(left, drawn)) drawn = left;
        if (second && better(right, drawn)) drawn = right;
    }
    drawn = best_of(drawn);
    if (me == 0) out[row] = drawn.index;
"""

_LEAST_SHIFTS: Final = {mx.bfloat16: 16, mx.float16: 12, mx.float32: 0}
"""Below this bit all ranks of a type are alike."""


def applies(logits: mx.array) -> bool:
    """Whether the kernel can take a call."""
    return cuda_kernels.usable(SWITCH) and logits.dtype in _LEAST_SHIFTS


def draw_tokens(logits: mx.array, settings: mx.array, keys: mx.array) -> mx.array:
    """Tokens [B, T] for logits [B, T, V].

    `settings` [B, 4] of float32 are 1 / temperature (0 is greedy), top_p, the logarithm of min_p and top_k (V for
    none); `keys` [B, T, 2] are the noise's.
    """
    rows, positions, _ = logits.shape
    (tokens,) = _kernel()(
        inputs=[logits, settings, keys],
        template=[("T", logits.dtype), ("LEAST_SHIFT", _LEAST_SHIFTS[logits.dtype])],
        grid=(rows * positions * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, positions)],
        output_dtypes=[mx.uint32],
    )
    result: mx.array = tokens
    return result


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="draw_tokens",
        input_names=["logits", "settings", "keys"],
        output_names=["out"],
        source=SOURCE,
        header=f"constexpr int THREADS = {THREADS};\n{HEADER}",
    )
