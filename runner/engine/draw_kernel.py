"""A draw for every row in one launch on CUDA: filters, noise and choice.

In separate operations a step of 128 rows and 128,000 tokens spends most of its sampling in a sort of all logits,
whose result is one threshold a row. Here a block of threads takes one row and finds its thresholds by histograms: it
sums what lies in each of a thousand parts (probabilities for top_p, tokens for top_k), and goes on within the part
where the sum from above is reached, ten bits of the logit's order-preserving bit pattern at a time. Sums are of whole
numbers, and do not depend on the order in which threads come, so equal logits give equal tokens. Then noise is made
for the tokens that are left only: the same noise, by token id, as in `runner.engine.draw`.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import mlx.core as mx

from runner.engine import cuda_kernels
from runner.engine.cuda_kernels import Kernel

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
    const int request = row / logits_shape[1], key = request * 2;
    const unsigned step = positions[request] + row % logits_shape[1];
    const float* setting = settings + request * 4;
    const float inverse = setting[0];
    const int me = threadIdx.x, lane = me & 31, warp = me >> 5;
    constexpr int WARPS = (THREADS + 31) / 32;
    constexpr int EACH = 16 / sizeof(T);
    constexpr int BINS = 1024, GROUP = 32;
    __shared__ unsigned low[BINS], high[BINS];
    __shared__ unsigned long long groups[BINS / GROUP];
    __shared__ Best bests[WARPS];

    // All logits, by all threads: 16 bytes at a time where rows begin at such.
    const bool vectors = V % EACH == 0;
    auto each = [&](auto what) {
        if (vectors) {
            #pragma unroll 4
            for (int i = me * EACH; i < V; i += THREADS * EACH) {
                const uint4 raw = *reinterpret_cast<const uint4*>(l + i);
                const T* x = reinterpret_cast<const T*>(&raw);
                #pragma unroll
                for (int e = 0; e < EACH; ++e) what(float(x[e]), i + e);
            }
        } else {
            for (int i = me; i < V; i += THREADS) what(float(l[i]), i);
        }
    };
    // A sum of ones over all threads.
    auto count = [&](auto counts) {
        if (me == 0) low[0] = 0;
        __syncthreads();
        unsigned mine = 0;
        each([&](float x, int i) { mine += counts(x, i) ? 1 : 0; });
        if (mine) atomicAdd(&low[0], mine);
        __syncthreads();
        const unsigned sum = low[0];
        __syncthreads();
        return sum;
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
    each([&](float x, int i) {
        if (x > most.value) most = {x, i};
    });
    most = best_of(most);
    if (inverse == 0.0f) {
        if (me == 0) out[row] = most.index;
        return;
    }

    const float largest = most.value;
    // Parts of 1/32 below the largest logit, in the order of logits; the last of them has all the rest.
    auto part_of = [&](float x) { return BINS - 1 + int(floorf(fmaxf((x - largest) * 32.0f, 1.0f - BINS))); };
    auto sum_of = [&](int bin) { return (static_cast<unsigned long long>(high[bin]) << 14) + low[bin]; };

    // The least rank such that the weight of all that is above it is less than `target_of` the weight of all; `above`
    // is that weight. First the part is found where that is, then the rank in it, ten bits at a time. Weights are whole
    // numbers of up to 28 bits, whose sum does not depend on the order.
    auto search = [&](auto weight, auto target_of, unsigned long long& above) {
        unsigned found = 0;
        int part = -1;
        unsigned long long target = 0;
        above = 0;
        for (int upper = 42; upper > LEAST_SHIFT;) {
            const int shift = upper == 42 ? 32 : max(LEAST_SHIFT, upper - 10);
            for (int b = me; b < BINS; b += THREADS) low[b] = high[b] = 0;
            __syncthreads();
            each([&](float x, int) {
                const int its = part_of(x);
                unsigned bin = its;
                if (part >= 0) {
                    const unsigned rank = rank_of(x);
                    if (its != part || (upper < 32 && ((rank ^ found) >> upper))) return;
                    bin = (rank >> shift) & (BINS - 1);
                }
                const unsigned w = weight(x);
                if (w & 0x3fffu) atomicAdd(&low[bin], w & 0x3fffu);
                if (w >> 14) atomicAdd(&high[bin], w >> 14);
            });
            __syncthreads();
            for (int g = me; g < BINS / GROUP; g += THREADS) {
                unsigned long long sum = 0;
                for (int b = 0; b < GROUP; ++b) sum += sum_of(g * GROUP + b);
                groups[g] = sum;
            }
            __syncthreads();
            if (part < 0) {
                unsigned long long total = 0;
                for (int g = 0; g < BINS / GROUP; ++g) total += groups[g];
                target = target_of(total);
            }
            int g = BINS / GROUP - 1;
            while (g > 0 && above + groups[g] < target) above += groups[g--];
            int bin = g * GROUP + GROUP - 1;
            while (bin > g * GROUP && above + sum_of(bin) < target) above += sum_of(bin--);
            if (part < 0) part = bin; else found |= unsigned(bin) << shift;
            __syncthreads();
            upper = shift;
        }
        return found;
    };

    unsigned least = 1u;
    const float top_p = setting[1];
    if (top_p < 1.0f) {
        unsigned long long above;
        auto probability = [&](float x) { return unsigned(expf(x - largest) * 268435456.0f + 0.5f); };
        // The most likely token stays, whatever top_p is.
        auto share = [&](unsigned long long total) {
            const auto some = static_cast<unsigned long long>(double(top_p) * double(total));
            return some > 1 ? some : 1;
        };
        least = search(probability, share, above);
    }
    if (setting[2] > -INFINITY) least = max(least, rank_of(largest + setting[2]));
    const int top_k = int(setting[3]);
    int last_equal = V;
    unsigned kth = 0;
    auto is_kth = [&](unsigned rank) { return rank >> LEAST_SHIFT == kth >> LEAST_SHIFT; };
    if (top_k < V) {
        unsigned long long above;
        auto one = [](float) { return 1u << 14; };
        auto many = [&](unsigned long long) { return static_cast<unsigned long long>(top_k) << 14; };
        kth = search(one, many, above);
        least = max(least, kth);
        const int room = top_k - int(above >> 14);
        if (room < int(count([&](float x, int) { return is_kth(rank_of(x)); }))) {
            // Of equals the first stay in: the least index up to which there are as many as there is room for.
            int first = 0, last = V - 1;
            while (first < last) {
                const int middle = (first + last) / 2;
                const auto upto = [&](float x, int i) { return i <= middle && is_kth(rank_of(x)); };
                if (int(count(upto)) >= room) last = middle; else first = middle + 1;
            }
            last_equal = first;
        }
    }

    auto stays = [&](float x, int i) {
        const unsigned rank = rank_of(x);
        return rank >= least && x > -INFINITY && !(i > last_equal && is_kth(rank));
    };
    const int half = (V + 1) / 2;
    Best drawn = {-INFINITY, most.index};
    auto pair = [&](float x, float y, int i) {
        const bool first = stays(x, i), second = stays(y, i + half);
        if (!first && !second) return;
        unsigned a = i, b = i + half;
        threefry(keys[key], keys[key + 1] + step, a, b);
        const Best left = {x * inverse + gumbel(a), i};
        const Best right = {y * inverse + gumbel(b), i + half};
        if (first && better(left, drawn)) drawn = left;
        if (second && better(right, drawn)) drawn = right;
    };
    if (V % (2 * EACH) == 0) {
        for (int i = me * EACH; i < half; i += THREADS * EACH) {
            const uint4 left = *reinterpret_cast<const uint4*>(l + i);
            const uint4 right = *reinterpret_cast<const uint4*>(l + i + half);
            const T* x = reinterpret_cast<const T*>(&left);
            const T* y = reinterpret_cast<const T*>(&right);
            #pragma unroll
            for (int e = 0; e < EACH; ++e) pair(float(x[e]), float(y[e]), i + e);
        }
    } else {
        for (int i = me; i < half; i += THREADS) pair(float(l[i]), i + half < V ? float(l[i + half]) : -INFINITY, i);
    }
    drawn = best_of(drawn);
    if (me == 0) out[row] = drawn.index;
"""

_LEAST_SHIFTS: Final = {mx.bfloat16: 16, mx.float16: 12, mx.float32: 0}
"""Below this bit all ranks of a type are alike."""


def applies(logits: mx.array) -> bool:
    """Whether the kernel can take a call."""
    return cuda_kernels.usable(SWITCH) and logits.dtype in _LEAST_SHIFTS


def draw_tokens(logits: mx.array, settings: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
    """Tokens [B, T] for logits [B, T, V].

    `settings` [B, 4] of float32 are 1 / temperature (0 is greedy), top_p, the logarithm of min_p and top_k (V for
    none); `keys` [B, 1, 2] of uint32 are the rows', to the second of which the token's position is added: `positions`
    [B, 1] of uint32 for the first of T.
    """
    rows, count, _ = logits.shape
    tokens: mx.array = _kernel(logits.dtype).launch(
        inputs=[logits, settings, keys, positions],
        grid=(rows * count * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, count)],
        output_dtypes=[mx.uint32],
    )[0]
    return tokens


def prepare(dtype: mx.Dtype) -> None:
    """Begin to compile the kernel for such logits, where it can be used: it takes longer than any other."""
    if cuda_kernels.usable(SWITCH) and dtype in _LEAST_SHIFTS:
        _kernel(dtype)


@cache
def _kernel(dtype: mx.Dtype) -> Kernel:
    return Kernel(
        name="draw_tokens",
        inputs={"logits": dtype, "settings": mx.float32, "keys": mx.uint32, "positions": mx.uint32},
        outputs={"out": mx.uint32},
        source=cuda_kernels.terse(SOURCE),
        header=f"constexpr int THREADS = {THREADS};\n{HEADER}",
        template=[("T", dtype), ("LEAST_SHIFT", _LEAST_SHIFTS[dtype])],
    )
