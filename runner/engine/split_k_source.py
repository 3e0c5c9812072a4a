"""How blocks that share K (split-K) come to one sum in `wide_product_source`, in CUDA.

With many tokens each block leaves its sums in `partial`; the one that comes last adds them up, and leaves the counter
as it was. With few, what that takes (a fence, a counter, and loads: each a way to the second cache and back, one after
the other) would be a fifth of the launch. There all but the last of them by number tell it theirs by way of `told`: a
number is its own sign that it is there, since a place without one has all bits set, which no sum has. The last looks at
the places until they have numbers, and leaves them as they were (`cuda_kernels.exchange`); the others have begun before
it and wait for nobody, so that they end whatever blocks run at once. NCCL's protocols of low latency have flags beside
the numbers for the same reason. Where a number does not come (two launches at once with the same places take it from
each other), a block stops looking after some seconds, and its sums are NaN: a wrong result can be seen, and a device
that never ends cannot.

Sums are always added in one order. Each of these is what stands at places of `wide_product_source.BODY`, and of what
`wide_changed_source` has there.
"""

from __future__ import annotations

from typing import Final

ALONE: Final = {
    "PREPARE": "",
    "TELL": "",
    "MEET": "",
    "GATHER": "",
    "PARTIALS": "1",
    "FOUR": "*reinterpret_cast<const float4*>(sums + r * PITCH + column)",
    "IS_LAST": "true",
    "UNLESS_LAST": "",
    "LOOKING": "1",
}
"""Where a block has all of K."""

TOLD: Final = ALONE | {
    "PREPARE": """
    static_assert(SPLITS > 1);
    constexpr int MOST_LOOKS = 1 << 22;
    // Four sums of a thread are of two tokens out of eight, and the same in all blocks: [SPLITS - 1, eights, threads].
    const int eights = (rows + 7) / 8;
    float4* const places = reinterpret_cast<float4*>(const_cast<float*>(told)) +
        size_t(block) * (SPLITS - 1) * eights * THREADS + threadIdx.x;
""",
    "TELL": """
    if (split < SPLITS - 1) {
        // Whatever NaN it is: one that is not all bits.
        auto number = [](float x) { return x == x ? x : __uint_as_float(0x7fffffff); };
        #pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i) {
            const float* const own = sum + i * 4;
            const float4 four = {number(own[0]), number(own[1]), number(own[2]), number(own[3])};
            if (i < eights) put(places + (split * eights + i) * THREADS, four);
        }
        return;
    }
    {
        float4 some[TOKENS / 8][SPLITS - 1];
        auto none = [](float x) { return __float_as_uint(x) == 0xffffffff; };
        // All of it again and again would be in the way of others, who still read weights.
        if (eights > 1) {
            #pragma unroll 1
            for (int s = 0, looks = 0; s < SPLITS - 1; ++s) {
                while (none(look(places + (s * eights + eights - 1) * THREADS).x) && ++looks < MOST_LOOKS) {}
            }
        }
        bool all = false;
        #pragma unroll 1
        for (int looks = 0; !all && looks < MOST_LOOKS; ++looks) {
            #pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) {
                #pragma unroll
                for (int s = 0; s < SPLITS - 1; ++s) {
                    if (i < eights) some[i][s] = look(places + (s * eights + i) * THREADS);
                }
            }
            all = true;
            #pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) {
                #pragma unroll
                for (int s = 0; s < SPLITS - 1; ++s) {
                    const float4 four = some[i][s];
                    if (i < eights && (none(four.x) || none(four.y) || none(four.z) || none(four.w))) all = false;
                }
            }
        }
        const float nothing = __uint_as_float(0xffffffff);
        #pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i) {
            if (i < eights) {
                float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
                #pragma unroll
                for (int s = 0; s < SPLITS - 1; ++s) {
                    const float4 more = some[i][s];
                    total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
                    put(places + (s * eights + i) * THREADS, {nothing, nothing, nothing, nothing});
                }
                float* const own = sum + i * 4;
                own[0] = total.x + own[0], own[1] = total.y + own[1];
                own[2] = total.z + own[2], own[3] = total.w + own[3];
            }
        }
    }
""",
    "UNLESS_LAST": "if (split < SPLITS - 1) return;",
}
"""Where several share it, and there are few tokens."""

SHARED: Final = {
    "PREPARE": "__shared__ int latest;",
    "TELL": "",
    "PARTIALS": "SPLITS",
    "IS_LAST": "latest",
    "UNLESS_LAST": "",
    "LOOKING": "SPLITS",
    "MEET": """
    float* const group = partial + size_t(block) * SPLITS * rows * LINES;
    for (int at = threadIdx.x; at < rows * (LINES / 4); at += THREADS) {
        const int r = at / (LINES / 4), n = at % (LINES / 4) * 4;
        *reinterpret_cast<float4*>(group + (size_t(split) * rows + r) * LINES + n) =
            *reinterpret_cast<const float4*>(sums + r * PITCH + n);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* const counter = const_cast<int*>(counters) + block;
        latest = atomicAdd(counter, 1) == SPLITS - 1;
        if (latest) *counter = 0;
    }
    __syncthreads();
    if (!latest) return;
    __threadfence();
""",
    "GATHER": """
    if (latest) {
        constexpr int AT_ONCE = SPLITS < 4 ? 8 : 32 / SPLITS;
        const int fours = rows * (LINES / 4);
        #pragma unroll 1
        for (int from = threadIdx.x; from < fours; from += THREADS * AT_ONCE) {
            float4 some[AT_ONCE][SPLITS];
            #pragma unroll
            for (int e = 0; e < AT_ONCE; ++e) {
                const int at = min(from + e * THREADS, fours - 1), r = at / (LINES / 4), column = at % (LINES / 4) * 4;
                #pragma unroll
                for (int s = 0; s < SPLITS; ++s) some[e][s] = FOUR;
            }
            #pragma unroll
            for (int e = 0; e < AT_ONCE; ++e) {
                const int at = from + e * THREADS;
                float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
                #pragma unroll
                for (int s = 0; s < SPLITS; ++s) {
                    sum.x += some[e][s].x, sum.y += some[e][s].y, sum.z += some[e][s].z, sum.w += some[e][s].w;
                }
                const int r = at / (LINES / 4), column = at % (LINES / 4) * 4;
                if (at < fours) *reinterpret_cast<float4*>(sums + r * PITCH + column) = sum;
            }
        }
    }
""",
    "FOUR": "__ldcg(reinterpret_cast<const float4*>(group + (size_t(s) * rows + r) * LINES + column))",
}
"""Where several share it, and there are many, or inner products are a result."""
