"""The source of `draw_kernel`, in CUDA.

A block takes a row, or one of several parts of its noise: it finds the row's thresholds from all logits, whatever its
part, since waiting for other blocks would take longer. T, LEAST_SHIFT (below this bit all ranks of a type are alike)
and THREADS, a multiple of 32, are constants. DEVICE is what only a GPU can do; tests on the host have their own.

**Thresholds.** A threshold is the logit at which what lies from there up reaches a target: a share of all probability
(top_p) or a number of tokens (top_k). It is found slot by slot: `tally` sums up what falls
into each of 256 slots, in a column for each lane, so that lanes never wait for each other however flat the logits are,
and goes on within the slot where the target is reached. The first slots are of an eighth of a nat each, the next of
equal parts of their order-preserving bit patterns. Sums are of whole numbers, and do not depend on the order in which
threads come, so equal logits give equal tokens. Within a slot of the first kind a probability is 17 bits relative to
the slot's middle: at most 4e-6 from exact, either way.

**Noise** is made for the tokens that are left only: the same, by token id, as in `runner.engine.draw`. Most cannot win
any more once a good one is found, and are passed over as early as that is certain: by their logits, before there is any
noise (it is at most 16.7), by the random bits that it is made of, or by a bound of it that is cheaper than itself. What
the block's threads have found so far is `bar`. It decides what is skipped, never what is drawn.
"""

from __future__ import annotations

from typing import Final

DEVICE: Final = """
__device__ inline int processors() {
    int count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
}
"""

HEADER: Final = """
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
constexpr int SLOTS = 256, LANES = 32;
constexpr unsigned ALL = 0xffffffffu;
using Sum = unsigned long long;

struct Best { float value; int index; };
// A slot; what of the target is left to it, and what it has.
struct Found { int slot; Sum rest, there; };

__device__ inline bool better(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The order of floats as the order of unsigned integers; -0 is 0.
__device__ inline unsigned rank_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}
// The float of a rank that has lost its lowest bits, which are all alike.
__device__ inline float value_of(unsigned shifted, int shift) {
    const unsigned rank = shifted << shift;
    return __uint_as_float((rank & 0x80000000u) ? rank & 0x7fffffffu : ~shifted << shift);
}

// Of a depth below the largest logit, in eighths of a nat: the nearest whole number, by the lowest bits of a sum.
constexpr float ROUND = 12582912.0f;
__device__ inline int slot_of(float depth) {
    return int(__float_as_uint(ROUND) - __float_as_uint(depth + ROUND));
}

// How top_p weighs tokens: e^(depth / 8) is a power of the slot (28 bits) times one of what rounding has left, by
// Taylor's series (18 bits). What is less than half of the least weight is none.
struct Probability {
    static __device__ bool counts(float depth) { return depth > -160.0f; }
    static __device__ float slotted(float depth) { return depth; }
    static __device__ unsigned weight(float depth) {
        const float left = depth - ((depth + ROUND) - ROUND);
        const float sum = fmaf(fmaf(fmaf(left, 42.666668f, 1024.0f), left, 16384.0f), left, 131072.0f + 8388608.0f);
        return __float_as_uint(sum) & 0x7fffffu;
    }
    static __device__ Sum scale(int slot) { return Sum(expf(slot * -0.125f) * 134217728.0f + 0.5f); }
};
// And top_k: the last slot has all the rest.
struct Number {
    static __device__ bool counts(float) { return true; }
    static __device__ float slotted(float depth) { return fmaxf(depth, 1.0f - SLOTS); }
    static __device__ unsigned weight(float) { return 1; }
    static __device__ Sum scale(int) { return 1; }
};

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
"""

SOURCE: Final = """
    const int V = logits_shape[2], steps = logits_shape[1], rows = logits_shape[0] * steps;
    const int asked = counters_shape[0], row = blockIdx.x / asked, split = blockIdx.x % asked;
    // More blocks than run at once would only come later.
    const int splits = max(1, min(asked, processors() / rows));
    if (split >= splits) return;
    const T* l = logits + size_t(row) * V;
    const int request = row / steps, key = request * 2;
    const unsigned step = positions[request] + row % steps;
    const float* setting = settings + request * 4;
    const float inverse = setting[0];
    const int me = threadIdx.x, lane = me % LANES, warp = me / LANES;
    constexpr int WARPS = THREADS / LANES;
    constexpr int EACH = 16 / sizeof(T);
    __shared__ uint4 columns[SLOTS * LANES / 4];
    __shared__ Sum totals[SLOTS];
    __shared__ Best bests[WARPS];
    __shared__ unsigned bar;
    unsigned* const sums = reinterpret_cast<unsigned*>(columns);
    if (me == 0) bar = rank_of(-INFINITY);

    // All logits, by all threads: 16 bytes at a time where rows begin at such, several of them on their way at once.
    auto each = [&](auto what) {
        if (V % EACH == 0) {
            constexpr int AHEAD = 4, STRIDE = THREADS * EACH;
            #pragma unroll 1
            for (int i = me * EACH; i < V; i += AHEAD * STRIDE) {
                uint4 raw[AHEAD];
                #pragma unroll
                for (int a = 0; a < AHEAD; ++a) {
                    if (i + a * STRIDE < V) raw[a] = *reinterpret_cast<const uint4*>(l + i + a * STRIDE);
                }
                #pragma unroll
                for (int a = 0; a < AHEAD; ++a) {
                    if (i + a * STRIDE >= V) break;
                    const T* x = reinterpret_cast<const T*>(&raw[a]);
                    #pragma unroll
                    for (int e = 0; e < EACH; ++e) what(float(x[e]), i + a * STRIDE + e);
                }
            }
        } else {
            for (int i = me; i < V; i += THREADS) what(float(l[i]), i);
        }
    };
    auto best_of = [&](Best mine) {
        auto among_lanes = [&] {
            #pragma unroll
            for (int width = LANES / 2; width > 0; width /= 2) {
                Best other;
                other.value = __shfl_xor_sync(ALL, mine.value, width);
                other.index = __shfl_xor_sync(ALL, mine.index, width);
                if (better(other, mine)) mine = other;
            }
        };
        among_lanes();
        if (lane == 0) bests[warp] = mine;
        __syncthreads();
        mine = bests[lane % WARPS];
        among_lanes();
        __syncthreads();
        return mine;
    };

    if (inverse == 0.0f) {
        if (split > 0) return;
        Best most = {-INFINITY, 0};
        each([&](float x, int i) {
            if (x > most.value) most = {x, i};
        });
        most = best_of(most);
        if (me == 0) out[row] = most.index;
        return;
    }
    float largest = -INFINITY;
    each([&](float x, int) { largest = fmaxf(largest, x); });
    largest = best_of({largest, 0}).value;

    // The first slot at which the sum of what is in it and before it reaches `target_of` all. `fill` adds a token to its.
    auto tally = [&](auto fill, auto scale_of, auto target_of) {
        for (int s = me; s < SLOTS * LANES / 4; s += THREADS) columns[s] = uint4{0, 0, 0, 0};
        __syncthreads();
        each(fill);
        __syncthreads();
        constexpr int SHARERS = 4, SHARE = LANES / SHARERS / 4;
        for (int s = me / SHARERS; s < SLOTS; s += THREADS / SHARERS) {
            Sum sum = 0;
            #pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                const uint4 four = columns[s * (LANES / 4) + me % SHARERS * SHARE + i];
                sum += Sum(four.x) + four.y + four.z + four.w;
            }
            #pragma unroll
            for (int width = 1; width < SHARERS; width *= 2) sum += __shfl_xor_sync(ALL, sum, width);
            if (me % SHARERS == 0) totals[s] = sum * scale_of(s);
        }
        __syncthreads();
        // Each warp comes to the same; a lane has consecutive slots.
        constexpr int OWN = SLOTS / LANES;
        Sum own = 0;
        #pragma unroll
        for (int s = 0; s < OWN; ++s) own += totals[lane * OWN + s];
        Sum upto = own;
        #pragma unroll
        for (int width = 1; width < LANES; width *= 2) {
            const Sum before = __shfl_up_sync(ALL, upto, width);
            if (lane >= width) upto += before;
        }
        const Sum target = target_of(__shfl_sync(ALL, upto, LANES - 1));
        const unsigned reached = __ballot_sync(ALL, upto >= target);
        const int where = reached ? __ffs(reached) - 1 : LANES - 1;
        Sum before = __shfl_sync(ALL, upto - own, where);
        int slot = where * OWN;
        while (slot < where * OWN + OWN - 1 && before + totals[slot] < target) before += totals[slot++];
        return Found{slot, target - before, totals[slot]};
    };
    // The distance, up to `span`, at which what `weigh` says of tokens reaches a target, counted from 0. `measure` says
    // at which distance a token is, if it counts at all.
    auto locate = [&](unsigned span, Sum target, auto measure, auto weigh, Sum scale, Found& found) {
        unsigned from = 0;
        for (;;) {
            const int shift = max(0, LANES - __clz(span) - 8);
            auto fill = [&](float x, int i) {
                unsigned distance;
                if (!measure(x, i, distance) || distance - from > span) return;
                atomicAdd(&sums[((distance - from) >> shift) * LANES + lane], weigh(x));
            };
            found = tally(fill, [&](int) { return scale; }, [&](Sum) { return target; });
            const unsigned passed = unsigned(found.slot) << shift;
            from += passed;
            if (shift == 0) return from;
            target = found.rest;
            span = min(span - passed, (1u << shift) - 1);
        }
    };
    const float origin = largest * -8.0f;
    // The logit at which weights from the largest down reach a target.
    auto search = [&](auto how, auto target_of, Found& found) {
        using How = decltype(how);
        auto depth_of = [&](float x) { return How::slotted(fmaf(x, 8.0f, origin)); };
        auto fill = [&](float x, int) {
            const float depth = depth_of(x);
            if (How::counts(depth)) atomicAdd(&sums[slot_of(depth) * LANES + lane], How::weight(depth));
        };
        found = tally(fill, How::scale, target_of);
        const int part = found.slot;
        // What the slot may have, and a little more on either side.
        const float middle = largest - part * 0.125f, reach = 0.0625f + (fabsf(largest) + 32.0f) * 1e-6f;
        const unsigned top = rank_of(fminf(largest, middle + reach)) >> LEAST_SHIFT;
        const unsigned bottom = part == SLOTS - 1 ? 0 : rank_of(middle - reach) >> LEAST_SHIFT;
        auto measure = [&](float x, int, unsigned& distance) {
            const float depth = depth_of(x);
            if (!How::counts(depth) || slot_of(depth) != part) return false;
            distance = top - (rank_of(x) >> LEAST_SHIFT);
            return true;
        };
        auto weigh = [&](float x) { return How::weight(depth_of(x)); };
        return value_of(top - locate(top - bottom, found.rest, measure, weigh, How::scale(part), found), LEAST_SHIFT);
    };

    // What stays is finite.
    float least = -3.4028235e38f;
    const float top_p = setting[1];
    Found found;
    if (top_p < 1.0f) {
        // The most likely token stays, whatever top_p is.
        auto share = [&](Sum total) { return max(Sum(1), Sum(double(top_p) * double(total))); };
        least = fmaxf(least, search(Probability(), share, found));
    }
    least = fmaxf(least, largest + setting[2]);
    const int top_k = int(setting[3]);
    int last_equal = V;
    float kth = -INFINITY;
    if (top_k < V) {
        kth = search(Number(), [&](Sum) { return Sum(top_k); }, found);
        least = fmaxf(least, kth);
        if (found.rest < found.there) {
            // Of equals the first stay in.
            auto measure = [&](float x, int i, unsigned& distance) {
                distance = i;
                return x == kth;
            };
            last_equal = locate(V - 1, found.rest, measure, [](float) { return 1u; }, 1, found);
        }
    }

    const int half = (V + 1) / 2;
    Best drawn = {-INFINITY, 0x7fffffff};
    // What the bar was when it was last looked at; the least logit that may come over it, and the least random bits.
    unsigned seen = rank_of(-INFINITY), bits = 0;
    float reached = -INFINITY, logit = least;
    auto look = [&] {
        const unsigned now = *static_cast<volatile unsigned*>(&bar);
        if (now == seen) return;
        seen = now;
        reached = value_of(now, 0);
        const float slack = 0.01f + 1e-5f * fabsf(reached);
        logit = fmaxf(least, (reached - 16.7f - slack) / inverse);
        // Noise of uniform u is at most -log(1 - u): the largest logit needs this u.
        const float needed = 1.0f - (__expf(fmaf(largest, inverse, slack - reached)) + 2.4e-7f);
        bits = needed > 0.0f ? unsigned(needed * 4294967296.0f) : 0;
    };
    auto consider = [&](float x, unsigned random, int i) {
        const float uniform = fminf(float(random) * 2.3283064365386963e-10f, 0.99999994f);
        if (fmaf(x, inverse, 1e-3f - __logf(1.0f - uniform)) < reached || (i > last_equal && x == kth)) return;
        const Best its = {fmaf(x, inverse, -logf(-logf(uniform))), i};
        if (!better(its, drawn)) return;
        drawn = its;
        if (its.value > reached) atomicMax(&bar, rank_of(its.value));
    };
    auto pair = [&](float x, float y, int i) {
        const bool first = x >= logit, second = y >= logit;
        if (!first && !second) return;
        look();
        unsigned a = i, b = i + half;
        threefry(keys[key], keys[key + 1] + step, a, b);
        if (first && a >= bits) consider(x, a, i);
        if (second && b >= bits) consider(y, b, i + half);
    };
    auto share_of = [&](int count, int of) { return int((long long)count * of / splits); };
    if (V % (2 * EACH) == 0) {
        const int vectors = half / EACH, end = share_of(vectors, split + 1) * EACH;
        #pragma unroll 1
        for (int i = (share_of(vectors, split) + me) * EACH; i < end; i += THREADS * EACH) {
            const uint4 left = *reinterpret_cast<const uint4*>(l + i);
            const uint4 right = *reinterpret_cast<const uint4*>(l + i + half);
            const T* x = reinterpret_cast<const T*>(&left);
            const T* y = reinterpret_cast<const T*>(&right);
            #pragma unroll
            for (int e = 0; e < EACH; ++e) pair(float(x[e]), float(y[e]), i + e);
        }
    } else {
        const int end = share_of(half, split + 1);
        for (int i = share_of(half, split) + me; i < end; i += THREADS) {
            pair(float(l[i]), i + half < V ? float(l[i + half]) : -INFINITY, i);
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
