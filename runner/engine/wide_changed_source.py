"""What makes a product with each row's low-rank change of `wide_product_source`, in CUDA.

The first blocks of the grid have lines of `down`, of all slots of a stack (`adapters/stack.py`); as many of them as
there are PIECES share K, and each leaves its sums in `inner` [PIECES, tokens, slots, ranks] and counts itself on the
board (`RowSlots`). The others have the weight's lines. They look for all of that only once their own sums are there:
whatever blocks run at once, those of lower numbers have begun before, and the first wait for nobody. Each
counts itself then as well, and the last leaves the board's counter at zero.

What all slots' `up` has for a block's lines comes into the cache while the product is computed, and into shared memory,
where chunks were, while sums are put there. A row's ranks are added in their order to the rounded product, as
`adapters/expand.py` does, and what follows is the same: so are the bits.

MOST_SLOTS is a constant beside those of `wide_product_source`. A part of the outputs ends where a block's lines do.
"""

from __future__ import annotations

from typing import Final

from runner.engine.wide_product_source import LEAVE

CHANGED: Final = {
    "SHARE": """
    const int O = N * PARTS, S = changes_shape[0], R = (changes_shape[1] - 64) / (K + O), ranks = S * R;
    const int before = (ranks + LINES - 1) / LINES * PIECES, own = blockIdx.x - before;
    const int shares = own < 0 ? PIECES : SPLITS, part = own < 0 ? blockIdx.x : own;
    const int block = part / shares, split = part % shares, first = block * (own < 0 ? LINES : OUT);
    const int there = own < 0 ? min(ranks - first, LINES) : LINES;
    __shared__ int slots[TOKENS], low[MOST_SLOTS * PARTS], high[MOST_SLOTS * PARTS], widest, told;
""",
    "LINES_OF": "(own < 0 ? changes + size_t(S) * 64 : w)",
    "APART": "(own < 0 ? OUT : N)",
    "THERE": "if (line + i < there)",
    "SEEK": """
    // Of all slots' `up`, what the block's lines have.
    const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S) * R * O + first;
    if (own >= 0) {
        if (threadIdx.x == 0) widest = told = 0;
        const int each = rows / board_shape[0];
        for (int r = threadIdx.x; r < rows; r += THREADS) slots[r] = board[32 + r / each];
        __syncthreads();
        // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
        for (int i = threadIdx.x; i < S * PARTS; i += THREADS) {
            const int* span = reinterpret_cast<const int*>(changes) + i / PARTS * 32;
            #pragma unroll 1
            while (span[0] <= first + i % PARTS * N) span += 3;
            low[i] = span[1], high[i] = span[2];
            atomicMax(&widest, (span[2] - span[1] / 4 * 4 + 3) / 4);
        }
        __syncthreads();
        for (int i = R * PARTS + threadIdx.x; i < S * R * PARTS; i += THREADS) {
            const int its = i / R, rank = i % R;
            if (rank < low[its] || rank >= high[its]) continue;
            #pragma unroll
            for (int n = 0; n < OUT; n += 64) {
                prefetch(up + (size_t(its / PARTS) * R + rank) * O + its % PARTS * N + n);
            }
        }
    }
""",
    "BEGIN": """
    // [slots but the first, PARTS, ranks, OUT], and [rows, PARTS, ranks] / 4: ranks from the last fourth one before a
    // span on.
    uint4* const values = tiles + TOKENS * PITCH / 4;
    const int wide = own < 0 ? 0 : widest, deep = wide * 4, most = (S - 1) * PARTS * deep * (OUT / 8);
    float4* const products = reinterpret_cast<float4*>(values + most);
    if (own >= 0) {
        for (int i = threadIdx.x; i < most; i += THREADS) {
            const int line = i / (OUT / 8), its = line / deep + PARTS, rank = low[its] / 4 * 4 + line % deep;
            if (rank < low[its] || rank >= high[its]) continue;
            const T* const from = up + (size_t(its / PARTS) * R + rank) * O + its % PARTS * N;
            copy(values + i, from + i % (OUT / 8) * 8, true);
        }
        close_group();
    }
""",
    "LEAVE": """
    if (own < 0) {
"""
    + LEAVE
    + """        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(const_cast<int*>(board), 1);
        return;
    }
""",
    "MEANWHILE": "if (threadIdx.x == 32) told = acquire(board);",
    "AWAIT": """
    // The counter is zero again once all have seen that the first are done.
    if (threadIdx.x == 0) {
        if (told < before) {
            while (acquire(board) < before) {}
        }
        atomicInc(reinterpret_cast<unsigned*>(const_cast<int*>(board)), before + O / LINES - 1);
    }
    __syncthreads();
    // Loads that are on their way at once, where a span has up to eight ranks all: each takes as long as some chunks.
    constexpr int VECTORS = TOKENS * PARTS * 2 / THREADS, MOST = 32 / PIECES;
    constexpr int TOGETHER = VECTORS < 1 || MOST < 1 ? 1 : VECTORS < MOST ? VECTORS : MOST;
    const size_t apart = size_t(rows) * ranks;
    for (int from = threadIdx.x; from < rows * PARTS * wide; from += THREADS * TOGETHER) {
        float4 some[TOGETHER][PIECES];
        #pragma unroll
        for (int e = 0; e < TOGETHER; ++e) {
            const int at = from + e * THREADS, line = at / wide, r = min(line / PARTS, rows - 1), slot = slots[r];
            const int its = slot * PARTS + line % PARTS, rank = (low[its] / 4 + at % wide) * 4;
            const bool wanted = slot > 0 && rank < high[its];
            const float* const first_piece = inner + (size_t(r) * S + slot) * R + (wanted ? rank : 0);
            #pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                some[e][piece] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (wanted) some[e][piece] = __ldcg(reinterpret_cast<const float4*>(first_piece + piece * apart));
            }
        }
        #pragma unroll
        for (int e = 0; e < TOGETHER; ++e) {
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
            #pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                sum.x += some[e][piece].x, sum.y += some[e][piece].y;
                sum.z += some[e][piece].z, sum.w += some[e][piece].w;
            }
            if (from + e * THREADS < rows * PARTS * wide) products[from + e * THREADS] = sum;
        }
    }
    wait_for_groups<0>();
    __syncthreads();
""",
    "CHANGE": """
            const int its_row = (from + e * THREADS) / (OUT / 8), vector_of = (from + e * THREADS) % (OUT / 8);
            const int slot = slots[its_row];
            #pragma unroll
            for (int i = 0; i < PARTS * 8; ++i) total[e][i / 8][i % 8] = float(T(total[e][i / 8][i % 8]));
            if (slot > 0) {
                #pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    const int its = slot * PARTS + p, begin_at = low[its] % 4, count = high[its] - low[its];
                    const uint4* const lines = values + ((its - PARTS) * deep + begin_at) * (OUT / 8) + vector_of;
                    const float* const own_products =
                        reinterpret_cast<const float*>(products + (its_row * PARTS + p) * wide) + begin_at;
                    #pragma unroll 8
                    for (int rank = 0; rank < count; ++rank) {
                        const uint4 eight = lines[rank * (OUT / 8)];
                        const T* const v = reinterpret_cast<const T*>(&eight);
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) total[e][p][i] += own_products[rank] * float(v[i]);
                    }
                }
            }
""",
}
"""What stands at these places of `wide_product_source.BODY`."""
