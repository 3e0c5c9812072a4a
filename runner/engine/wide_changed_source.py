"""What makes a product with each row's low-rank change of `wide_product_source`, in CUDA.

Each block has SIDE threads more. The first blocks of the grid, in which these multiply as well, have lines of `down`,
of all slots of a stack (`adapters/stack.py`); as many of them as there are PIECES share K, and each leaves its sums in
`inner` [PIECES, tokens, slots, ranks] and counts itself on the board (`RowSlots`). The others have the weight's lines.
While those are multiplied, the threads at the side look up which ranks each slot has, bring what all slots' `up` has
for the block's lines into shared memory, wait for the first blocks, and add up the pieces of each row's inner products,
so that in the end all of it is there. Whatever blocks run at once, those of lower numbers have begun before, and the
first wait for nobody. Those of the others that look for them, which are the last of each that share K where these are
told sums (`split_k_source.py`), count themselves as well, and the last leaves the board's counter at zero.

`up` and the inner products lie beside the chunks in BESIDE bytes; more of them than that comes where chunks were, once
those are multiplied. A row's ranks are added in their order to the rounded product, as `adapters/expand.py` does, and
what follows is the same: so are the bits. What runs once is loops that are not unrolled, where that is possible: a
block's code has to come from memory, too, and nothing else happens meanwhile.

SIDE, BESIDE and MOST_SLOTS are constants beside those of `wide_product_source`. A part of the outputs ends where a
block's lines do.
"""

from __future__ import annotations

from typing import Final

from runner.engine.cuda_kernels import filled
from runner.engine.wide_product_source import KEEP, LEAVE, LOOP

MEETINGS: Final = """
// So many threads wait for each other, or say that they have come, at a barrier of their own.
__device__ inline void meet(int which, int count) {
    asm volatile("bar.sync %0, %1;" :: "r"(which), "r"(count) : "memory");
}
__device__ inline void arrive(int which, int count) {
    asm volatile("bar.arrive %0, %1;" :: "r"(which), "r"(count) : "memory");
}
"""
"""What only a GPU can do, beside `changed_source.CHANGED_DEVICE`."""


def _inner_product() -> str:
    places = {"LINES_OF": "(changes + size_t(S) * 64)", "APART": "OUT", "THERE": "if (line + i < there)"}
    # All of the block's threads are at it.
    return filled(LOOP + KEEP, places | {"__syncthreads()": "meet(ALL, MOST)"})


_INNER: Final = (
    """
    if (own < 0) {
        constexpr int ROOM = STAGES * STAGE + BESIDE / 16, MOST = THREADS + SIDE;
        constexpr int DEEPEST = ROOM / ((LINES + SIDE / 2 + TOKENS) * 8);
        {
            constexpr int THREADS = MOST, LINES = THREADS / 2, OUT = LINES, STEP = THREADS / 8;
            constexpr int STAGE = (LINES + TOKENS) * 8, STAGES = DEEPEST < 8 ? DEEPEST : 8, PITCH = LINES + 4;
            static_assert(STAGES > 2);
            const int there = min(ranks - first, LINES);
"""
    + _inner_product()
    + "{"
    + LEAVE
    + """
            }
        }
        __threadfence();
        meet(ALL, MOST);
        if (threadIdx.x == 0) atomicAdd(const_cast<int*>(board), 1);
        return;
    }
"""
)

_SIDE: Final = """
    if (threadIdx.x >= THREADS) {
        UNLESS_LAST
        const int me = threadIdx.x - THREADS, each = rows / board_shape[0];
        // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them. The first of a
        // slot, and a row's slot, are in no cache, and on their way together.
        static_assert(TOKENS <= SIDE && MOST_SLOTS * PARTS <= SIDE);
        const int* span = reinterpret_cast<const int*>(changes) + me / PARTS * 32;
        int ends = me < S * PARTS ? span[0] : 0;
        if (me < rows) slots[me] = board[32 + me / each];
        if (me == 0) widest = 0;
        meet(AT_THE_SIDE, SIDE);
        if (me < S * PARTS) {
            #pragma unroll 1
            while (ends <= first + me % PARTS * N) span += 3, ends = span[0];
            low[me] = span[1], high[me] = span[2];
            atomicMax(&widest, (span[2] - span[1] / 4 * 4 + 3) / 4);
        }
        meet(AT_THE_SIDE, SIDE);
        const int wide = widest, deep = wide * 4, lines = (S - 1) * PARTS * deep;
        uint4* const values = room_for(wide);
        const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S) * R * O + first;
        if (is_beside(wide)) arrive(CHUNKS_ARE_DONE, THREADS + SIDE);
        // Where it has to wait for room, it comes into the cache first.
        #pragma unroll 1
        for (int now = is_beside(wide); now < 2; ++now) {
            if (now && !is_beside(wide)) meet(CHUNKS_ARE_DONE, THREADS + SIDE);
            #pragma unroll 1
            for (int its = PARTS; its < S * PARTS; ++its) {
                const int n = me % (OUT / 8) * 8, lowest = low[its], highest = high[its];
                const T* const from = up + size_t(its / PARTS) * R * O + its % PARTS * N + n;
                uint4* const to = values + ((its - PARTS) * deep - lowest / 4 * 4) * (OUT / 8) + n / 8;
                #pragma unroll 1
                for (int rank = lowest + me / (OUT / 8); rank < highest; rank += SIDE / (OUT / 8)) {
                    if (now) copy(to + rank * (OUT / 8), from + size_t(rank) * O, true);
                    else if (n % 64 == 0) prefetch(from + size_t(rank) * O);
                }
            }
        }
        close_group();
        if (me == 0) {
            while (acquire(board) < before) {}
            // The counter is zero again once all have seen that the first are done.
            atomicInc(reinterpret_cast<unsigned*>(const_cast<int*>(board)), before + O / LINES * LOOKING - 1);
        }
        meet(AT_THE_SIDE, SIDE);
        float4* const products = reinterpret_cast<float4*>(values + lines * (OUT / 8));
        // Loads that are on their way at once: each takes as long as some chunks.
        constexpr int TOGETHER = PIECES < 16 ? 16 / PIECES : 1;
        const size_t next_piece = size_t(rows) * ranks;
        const int fours = rows * PARTS * wide;
        #pragma unroll 1
        for (int from = me; from < fours; from += SIDE * TOGETHER) {
            float4 some[TOGETHER][PIECES];
            #pragma unroll
            for (int e = 0; e < TOGETHER; ++e) {
                const int at = min(from + e * SIDE, fours - 1), line = at / wide, r = line / PARTS, slot = slots[r];
                const int its = slot * PARTS + line % PARTS, rank = (low[its] / 4 + at % wide) * 4;
                const bool wanted = slot > 0 && rank < high[its];
                const float* const first_piece = inner + (size_t(r) * S + slot) * R + (wanted ? rank : 0);
                #pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    const float* const four = first_piece + piece * next_piece;
                    some[e][piece] = {0.0f, 0.0f, 0.0f, 0.0f};
                    if (wanted) some[e][piece] = __ldcg(reinterpret_cast<const float4*>(four));
                }
            }
            #pragma unroll
            for (int e = 0; e < TOGETHER; ++e) {
                float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
                #pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    total.x += some[e][piece].x, total.y += some[e][piece].y;
                    total.z += some[e][piece].z, total.w += some[e][piece].w;
                }
                const int at = from + e * SIDE;
                if (at < fours) products[at + at / (PARTS * wide)] = total;
            }
        }
        wait_for_groups<0>();
    } else {
"""

_FINISH: Final = """
        BRING
        GATHER
        wait_for_groups<0>();
    }
    // All of the block's threads meet here, and go on.
    __syncthreads();
    if (!(IS_LAST)) return;
    // With few rows a thread has fewer outputs, so that there are some for more threads.
    constexpr int e = 0, AT_ONCE = 1, SOME = TOKENS > 32 ? 8 : 4;
    struct alignas(SOME * 2) Outputs { T of[SOME]; };
    const int wide = widest, deep = wide * 4, vectors = rows * (OUT / SOME);
    const uint4* const brought = room_for(wide);
    const Outputs* const values = reinterpret_cast<const Outputs*>(brought);
    const float4* const products = reinterpret_cast<const float4*>(brought + (S - 1) * PARTS * deep * (OUT / 8));
    #pragma unroll 1
    for (int at = threadIdx.x; at < vectors; at += THREADS + SIDE) {
        const int r = at / (OUT / SOME), v = at % (OUT / SOME), slot = slots[r];
        const size_t place = size_t(r) * N + first + v * SOME;
        float total[AT_ONCE][PARTS][SOME];
        BEFORE
        AGAIN
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            #pragma unroll
            for (int i = 0; i < SOME; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(sums + r * PITCH + p * OUT + v * SOME + i);
                total[e][p][i] = float(T(four.x)), total[e][p][i + 1] = float(T(four.y));
                total[e][p][i + 2] = float(T(four.z)), total[e][p][i + 3] = float(T(four.w));
            }
        }
        if (slot > 0) {
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                const int its = slot * PARTS + p, begin_at = low[its] % 4, count = high[its] - low[its];
                const Outputs* const lines = values + ((its - PARTS) * deep + begin_at) * (OUT / SOME) + v;
                const float* const own_products =
                    reinterpret_cast<const float*>(products + (r * PARTS + p) * wide + r) + begin_at;
                #pragma unroll 4
                for (int rank = 0; rank < count; ++rank) {
                    const Outputs factors = lines[rank * (OUT / SOME)];
                    #pragma unroll
                    for (int i = 0; i < SOME; ++i) total[e][p][i] += own_products[rank] * float(factors.of[i]);
                }
            }
        }
        Outputs result;
        T* const written = result.of;
        #pragma unroll
        for (int i = 0; i < SOME; ++i) STORE
        *reinterpret_cast<Outputs*>(out + place) = result;
    }
"""

CHANGED: Final = {
    "SHARE": """
    // Barriers, of which the first is __syncthreads.
    constexpr int ALL = 0, MULTIPLYING = 1, AT_THE_SIDE = 2, CHUNKS_ARE_DONE = 3;
    const int O = N * PARTS, S = changes_shape[0], R = (changes_shape[1] - 64) / (K + O), ranks = S * R;
    constexpr int INNER_LINES = LINES + SIDE / 2;
    const int before = (ranks + INNER_LINES - 1) / INNER_LINES * PIECES, own = blockIdx.x - before;
    const int shares = own < 0 ? PIECES : SPLITS, part = own < 0 ? blockIdx.x : own;
    LEFT
    const int block = part / shares, split = part % shares, first = block * (own < 0 ? INNER_LINES : OUT);
    __shared__ int slots[TOKENS], low[MOST_SLOTS * PARTS], high[MOST_SLOTS * PARTS], widest;
""",
    "OTHERS": _INNER
    + """
    // [slots but the first, PARTS, ranks, OUT], and [rows, PARTS, ranks] / 4: ranks from the last fourth one before a
    // span on, `wide` fours of them. Where chunks were, sums and what is added come before. A row has one four more, so
    // that rows which are read at once are in different banks.
    auto is_beside = [&](int wide) {
        return ((S - 1) * PARTS * wide * (OUT / 2) + rows * (PARTS * wide + 1)) * 16 <= BESIDE;
    };
    auto room_for = [&](int wide) {
        return tiles + (is_beside(wide) ? STAGES * STAGE : TOKENS * (PITCH / 4 + OUT / 8));
    };
"""
    + _SIDE,
    "BEGIN": "arrive(CHUNKS_ARE_DONE, THREADS + SIDE);",
    "LEAVE": "",
    "if (!latest) return;": "",
    "__syncthreads()": "meet(MULTIPLYING, THREADS)",
    "FINISH": _FINISH,
    "LINES_OF": "w",
    "APART": "N",
    "THERE": "",
}
"""What stands at these places of `wide_product_source.BODY`, in this order."""

IN_A_ROOM: Final = "float* const inner = const_cast<float*>(room);"
"""What stands at LEFT where inner products are in a room (`cuda_kernels.room`)."""

IN_A_RESULT: Final = """
    float* const inner = left;
    float* const partial = left + size_t(PIECES) * rows * ranks;
"""
"""The same where they, and sums of parts of K, are a result."""

RESIDUAL: Final = {
    "plain": {
        "BRING": """
        uint4* const residual = tiles + TOKENS * (PITCH / 4);
        if (added_ndim > 1 && (IS_LAST)) {
            #pragma unroll 1
            for (int at = threadIdx.x; at < rows * (OUT / 8); at += THREADS) {
                copy(residual + at, added + size_t(at / (OUT / 8)) * N + first + at % (OUT / 8) * 8, true);
            }
        }
        close_group();
""",
        "AGAIN": """
        if (added_ndim > 1) {
            const Outputs* const residuals = reinterpret_cast<const Outputs*>(tiles + TOKENS * (PITCH / 4));
            *reinterpret_cast<Outputs*>(&before[e]) = residuals[at];
        }
""",
    },
    "swiglu": {"BRING": "", "AGAIN": ""},
}
"""The same of FINISH, by epilogue: what is added is on its way while sums are."""
