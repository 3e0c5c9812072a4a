"""The source of `draw_kernel` that makes noise and chooses, in CUDA: what comes after the thresholds of `draw_source`.

Noise is made for the tokens that are left only: the same, by token id, as in `runner.engine.draw`. Most cannot win
any more once a good one is found, and are passed over as early as that is certain: by their logits, before there is any
noise (it is at most 16.7), or by the random bits that it would be made of. The best that the block's threads have found
so far is `bar`: it decides what is passed over, never what is drawn.

A block has a part of the row's pairs of tokens. Of several blocks the last to come to the end, by `counters`, has the
best of what all have left in `parts`.
"""

from __future__ import annotations

from typing import Final

GENERATOR: Final = """
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

NOISE: Final = """
    const int half = (V + 1) / 2;
    const unsigned k0 = keys[key], k1 = keys[key + 1] + step;
    const float temperature = 1.0f / inverse;
    Best drawn = {-INFINITY, 0x7fffffff};
    // Pairs of tokens have one call of the generator. A batch of EACH pairs, `stride` apart, has a flag for each token.
    auto examine = [&](unsigned flags, int from, int stride) {
        while (flags) {
            const int flag = __ffs(flags) - 1, i = from + flag % EACH * stride, token = flag < EACH ? i : i + half;
            flags &= flags - 1;
            const float x = token < V ? float(l[token]) : -INFINITY;
            if (!(x >= least) || (token > last_equal && x == kth)) continue;
            unsigned a = i, b = i + half;
            threefry(k0, k1, a, b);
            const Best its = {fmaf(x, inverse, gumbel(flag < EACH ? a : b)), token};
            if (!better(its, drawn)) continue;
            drawn = its;
            atomicMax(&bar, rank_of(its.value));
        }
    };
    // `larger` are those of each pair's logits.
    auto batch = [&](const float (&larger)[EACH], int from, int stride) {
        float most = larger[0];
        #pragma unroll
        for (int e = 1; e < EACH; ++e) most = fmaxf(most, larger[e]);
        if (most < least) return;
        const float reached = value_of(*static_cast<volatile unsigned*>(&bar), 0);
        const float slack = 0.01f + 1e-5f * fabsf(reached);
        const float logit = fmaxf(least, (reached - 16.7f - slack) * temperature);
        if (most < logit) return;
        // Noise of a uniform u is at most -log(1 - u): the largest logit needs this u.
        const float enough = 1.0f - (__expf(fmaf(most, inverse, slack - reached)) + 2.4e-7f);
        const unsigned bits = enough > 0.0f ? unsigned(enough * 4294967296.0f) : 0;
        unsigned flags = 0;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            if (!(larger[e] >= logit)) continue;
            unsigned a = from + e * stride, b = a + half;
            threefry(k0, k1, a, b);
            if (a >= bits) flags |= 1u << e;
            if (b >= bits) flags |= 1u << (e + EACH);
        }
        examine(flags, from, stride);
    };
    // The block's own part: vectors where rows have whole ones, a token at a time where not.
    const int vectors = V % (2 * EACH) == 0 ? EACH : 1, pairs = half / vectors;
    const int begin = int((long long)pairs * split / splits), end = int((long long)pairs * (split + 1) / splits);
    // So that few are flagged, there is a bar first.
    if (begin + me < end) examine(1u | 1u << EACH, (begin + me) * vectors, 1);
    __syncthreads();
    float larger[EACH];
    if (vectors > 1) {
        #pragma unroll 1
        for (int i = begin + me; i < end; i += THREADS) {
            const uint4 raw[2] = {reinterpret_cast<const uint4*>(l)[i], reinterpret_cast<const uint4*>(l + half)[i]};
            #pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const T* const x = reinterpret_cast<const T*>(&raw[0]);
                const T* const y = reinterpret_cast<const T*>(&raw[1]);
                larger[e] = fmaxf(float(x[e]), float(y[e]));
            }
            batch(larger, i * EACH, 1);
        }
    } else {
        #pragma unroll 1
        for (int i = begin + me; i < end; i += THREADS * EACH) {
            #pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int at = i + e * THREADS;
                larger[e] = at < end ? float(l[at]) : -INFINITY;
                if (at < end && at + half < V) larger[e] = fmaxf(larger[e], float(l[at + half]));
            }
            batch(larger, i, THREADS);
        }
    }
    drawn = best_of(drawn);
    if (me != 0) return;
    if (splits > 1) {
        // The block that comes last has the best of all, and leaves the counter as it was.
        uint2* const parts_of = reinterpret_cast<uint2*>(parts) + row * asked;
        parts_of[split] = uint2{__float_as_uint(drawn.value), unsigned(drawn.index)};
        __threadfence();
        int* const counter = const_cast<int*>(counters) + row;
        if (atomicAdd(counter, 1) != splits - 1) return;
        *counter = 0;
        __threadfence();
        for (int s = 0; s < splits; ++s) {
            const uint2 its = __ldcg(parts_of + s);
            const Best other = {__uint_as_float(its.x), int(its.y)};
            if (better(other, drawn)) drawn = other;
        }
    }
    out[row] = drawn.index < V ? drawn.index : 0;
"""
