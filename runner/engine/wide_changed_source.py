"""What makes a product with each row's low-rank change of `wide_product_source`, in CUDA.

Each block has SIDE threads more. The first blocks of the grid, in which these multiply as well, have lines of `down`,
of all slots of a stack (`adapters/stack.py`); as many of them as there are PIECES share K, and each leaves its sums in
`inner` [PIECES, tokens, slots, ranks] and counts itself on the board (`RowSlots`). The others have the weight's lines.
While those are multiplied, the threads at the side look up which ranks each slot has, bring what all slots' `up` has
for the block's lines into shared memory, wait for the first blocks, and add up the pieces of each row's inner products,
so that in the end all of it is there. Whatever blocks run at once, those of lower numbers have begun before, and the
first wait for nobody. Each of the others counts itself as well, and the last leaves the board's counter at zero.

`up` and the inner products lie beside the chunks in BESIDE bytes; more of them than that comes where chunks were, once
those are multiplied. A row's ranks are added in their order to the rounded product, as `adapters/expand.py` does, and
what follows is the same: so are the bits. What runs once is loops that are not unrolled, where that is possible: a
block's code has to come from memory, too, and nothing else happens meanwhile.

SIDE, BESIDE and MOST_SLOTS are constants beside those of `wide_product_source`. A part of the outputs ends where a
block's lines do.
"""

from __future__ import annotations

from typing import Final

from runner.engine.cuda_kernels import COUNTERS
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
    text = LOOP + KEEP
    places = {"LINES_OF": "(changes + size_t(S) * 64)", "APART": "OUT", "THERE": "if (line + i < there)"}
    # All of the block's threads are at it.
    for place, what in (places | {"__syncthreads()": "meet(ALL, MOST)"}).items():
        text = text.replace(place, what)
    return text


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
        const int me = threadIdx.x - THREADS, each = rows / board_shape[0];
        if (me == 0) widest = 0;
        #pragma unroll 1
        for (int r = me; r < rows; r += SIDE) slots[r] = board[32 + r / each];
        meet(AT_THE_SIDE, SIDE);
        // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
        #pragma unroll 1
        for (int i = me; i < S * PARTS; i += SIDE) {
            const int* span = reinterpret_cast<const int*>(changes) + i / PARTS * 32;
            #pragma unroll 1
            while (span[0] <= first + i % PARTS * N) span += 3;
            low[i] = span[1], high[i] = span[2];
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
            for (int line = me / (OUT / 8); line < lines; line += SIDE / (OUT / 8)) {
                const int its = line / deep + PARTS, rank = low[its] / 4 * 4 + line % deep, n = me % (OUT / 8) * 8;
                if (rank < low[its] || rank >= high[its]) continue;
                const T* const from = up + (size_t(its / PARTS) * R + rank) * O + its % PARTS * N + n;
                if (now) copy(values + line * (OUT / 8) + n / 8, from, true);
                else if (n % 64 == 0) prefetch(from);
            }
        }
        close_group();
        if (me == 0) {
            while (acquire(board) < before) {}
            // The counter is zero again once all have seen that the first are done.
            atomicInc(reinterpret_cast<unsigned*>(const_cast<int*>(board)), before + O / LINES * SPLITS - 1);
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
                if (from + e * SIDE < fours) products[from + e * SIDE] = total;
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
    if (SPLITS > 1 && !latest) return;
    constexpr int e = 0, AT_ONCE = 1;
    const int wide = widest, deep = wide * 4, vectors = rows * (OUT / 8);
    const uint4* const values = room_for(wide);
    const float4* const products = reinterpret_cast<const float4*>(values + (S - 1) * PARTS * deep * (OUT / 8));
    #pragma unroll 1
    for (int at = threadIdx.x; at < vectors; at += THREADS + SIDE) {
        const int r = at / (OUT / 8), v = at % (OUT / 8), slot = slots[r];
        const size_t place = size_t(r) * N + first + v * 8;
        float total[AT_ONCE][PARTS][8];
        BEFORE
        AGAIN
        #pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            #pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(sums + r * PITCH + p * OUT + v * 8 + i);
                total[e][p][i] = float(T(four.x)), total[e][p][i + 1] = float(T(four.y));
                total[e][p][i + 2] = float(T(four.z)), total[e][p][i + 3] = float(T(four.w));
            }
        }
        if (slot > 0) {
            #pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                const int its = slot * PARTS + p, begin_at = low[its] % 4, count = high[its] - low[its];
                const uint4* const lines = values + ((its - PARTS) * deep + begin_at) * (OUT / 8) + v;
                const float* const own_products =
                    reinterpret_cast<const float*>(products + (r * PARTS + p) * wide) + begin_at;
                #pragma unroll 4
                for (int rank = 0; rank < count; ++rank) {
                    const uint4 eight = lines[rank * (OUT / 8)];
                    const T* const factors = reinterpret_cast<const T*>(&eight);
                    #pragma unroll
                    for (int i = 0; i < 8; ++i) total[e][p][i] += own_products[rank] * float(factors[i]);
                }
            }
        }
        uint4 result;
        T* const written = reinterpret_cast<T*>(&result);
        #pragma unroll
        for (int i = 0; i < 8; ++i) STORE
        *reinterpret_cast<uint4*>(out + place) = result;
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
    // What blocks leave for each other: inner products, and sums of parts of K.
    LEFT
    float* const inner = left;
    float* const partial = left + size_t(PIECES) * rows * ranks;
    const int block = part / shares, split = part % shares, first = block * (own < 0 ? INNER_LINES : OUT);
    __shared__ int slots[TOKENS], low[MOST_SLOTS * PARTS], high[MOST_SLOTS * PARTS], widest;
""",
    "OTHERS": _INNER
    + """
    // [slots but the first, PARTS, ranks, OUT], and [rows, PARTS, ranks] / 4: ranks from the last fourth one before a
    // span on, `wide` fours of them. Where chunks were, sums and what is added come before.
    auto is_beside = [&](int wide) {
        return ((S - 1) * PARTS * wide * (OUT / 2) + rows * PARTS * wide) * 16 <= BESIDE;
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

IN_A_ROOM: Final = f"""
    int* const counters = const_cast<int*>(room);
    float* const left = reinterpret_cast<float*>(counters + {COUNTERS});
"""
"""What stands at LEFT where that is in a room (`cuda_kernels.room`), not a result."""

RESIDUAL: Final = {
    "plain": {
        "BRING": """
        uint4* const residual = tiles + TOKENS * (PITCH / 4);
        if (added_ndim > 1 && (SPLITS == 1 || latest)) {
            #pragma unroll 1
            for (int at = threadIdx.x; at < rows * (OUT / 8); at += THREADS) {
                copy(residual + at, added + size_t(at / (OUT / 8)) * N + first + at % (OUT / 8) * 8, true);
            }
        }
        close_group();
""",
        "AGAIN": "if (added_ndim > 1) before[e] = tiles[TOKENS * (PITCH / 4) + at];",
    },
    "swiglu": {"BRING": "", "AGAIN": ""},
}
"""The same of FINISH, by epilogue: what is added is on its way while sums are."""
