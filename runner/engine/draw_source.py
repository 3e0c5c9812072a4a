"""The source of `draw_kernel`, in CUDA.

A block takes a row, or one of several parts of its noise: it finds the row's thresholds from all logits, whatever its
part, since blocks that wait for each other may never run at once. T, LEAST_SHIFT (below this bit all ranks of a type
are alike) and THREADS, a multiple of 32, are constants. DEVICE is what only a GPU can do; tests on the host have their
own.

**Thresholds.** A threshold is the logit at which what lies from there up reaches a target: a share of all probability
(top_p) or a number of tokens (top_k). It is found slot by slot: `tally` sums up what falls into each of 256 slots, in a
column for each lane, so that lanes never wait for each other however flat the logits are, and goes on within the slot
where the target is reached. The first slots are of an eighth of a nat each, the next of equal parts of their
order-preserving bit patterns. Sums are of whole numbers, and do not depend on the order in which threads come, so equal
logits give equal tokens. A probability is rounded to 4e-6 of itself within its slot, and to 2^-28 of the largest one.

**Noise** and the choice are the rest of it (`draw_noise.py`).
"""

from __future__ import annotations

from typing import Final

from runner.engine.draw_noise import GENERATOR, NOISE

DEVICE: Final = """
__device__ inline int processors() {
    int count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
}
"""

_HEADER: Final = """
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

// A depth is a logit less the largest, in eighths of a nat. This added to it leaves the nearest whole number.
constexpr float ROUND = 12582912.0f;
__device__ inline int slot_of(float rounded) { return int(__float_as_uint(ROUND) - __float_as_uint(rounded)); }

// How top_p weighs tokens: e^(depth / 8) is a power of the slot (28 bits, none after the 155th) times one of what
// rounding has left, by Taylor's series (18 bits).
struct Probability {
    static __device__ unsigned weight(float depth) {
        const float left = depth - ((depth + ROUND) - ROUND);
        const float sum = fmaf(fmaf(fmaf(left, 42.666668f, 1024.0f), left, 16384.0f), left, 131072.0f + 8388608.0f);
        return __float_as_uint(sum) & 0x7fffffu;
    }
    static __device__ Sum scale(int slot) { return Sum(expf(slot * -0.125f) * 134217728.0f + 0.5f); }
};
// And top_k.
struct Number {
    static __device__ unsigned weight(float) { return 1; }
    static __device__ Sum scale(int) { return 1; }
};
"""

HEADER: Final = _HEADER + GENERATOR

_THRESHOLDS: Final = """
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
            constexpr int AHEAD = 2, STRIDE = THREADS * EACH;
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

    // The first slot that, with those before it, reaches `target_of` the sum of all. `fill` adds a token to its slot.
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
    // Depths are not above 0, even where all logits are close to the least float; the last slot has all the rest.
    const float origin = fminf(largest * -8.0f, 3e38f);
    auto depth_of = [&](float x) { return fmaxf(fmaf(x, 8.0f, origin), 1.0f - SLOTS); };
    // The logit at which weights from the largest down reach a target.
    auto search = [&](auto how, auto target_of, Found& found) {
        using How = decltype(how);
        auto fill = [&](float x, int) {
            const float depth = depth_of(x);
            atomicAdd(&sums[slot_of(depth + ROUND) * LANES + lane], How::weight(depth));
        };
        found = tally(fill, How::scale, target_of);
        const int part = found.slot;
        // What the slot may have, and a little more on either side.
        const float middle = largest - part * 0.125f, reach = 0.0625f + (fabsf(largest) + 32.0f) * 1e-6f;
        const unsigned top = rank_of(fminf(largest, middle + reach)) >> LEAST_SHIFT;
        const unsigned bottom = part == SLOTS - 1 ? 0 : rank_of(middle - reach) >> LEAST_SHIFT;
        auto measure = [&](float x, int, unsigned& distance) {
            if (depth_of(x) + ROUND != ROUND - part) return false;
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
"""

SOURCE: Final = _THRESHOLDS + NOISE
