"""What makes a product with each row's low-rank change of `wide_product_source`, in CUDA.

The first blocks of the grid have lines of `down`, of all slots of a stack (`adapters/stack.py`); as many of them as
there are PIECES share K, and each leaves its sums in `inner` [PIECES, tokens, slots, ranks] and counts itself on the
board (`RowSlots`). The others have the weight's lines. They look for all of that only once their own sums are there:
whatever blocks run at once, those of lower numbers have begun before, and the first wait for nobody. Who comes last
leaves both counters of the board at zero.

What all slots' `up` has for a block's lines comes into the cache while the product is computed, and into shared memory,
where chunks were, while sums are put there. A row's ranks are added in their order to the rounded product, as
`adapters/expand.py` does, and what follows is the same: so are the bits.

MOST_SLOTS is a constant beside those of `wide_product_source`. A part of the outputs ends where a block's lines do.
"""

from __future__ import annotations

from typing import Final

CHANGED: Final = {
    "SHARE": """
    const int O = N * PARTS, S = changes_shape[0], R = (changes_shape[1] - 64) / (K + O), ranks = S * R;
    const int before = (ranks + LINES - 1) / LINES * PIECES, own = blockIdx.x - before;
    const int shares = own < 0 ? PIECES : SPLITS, part = own < 0 ? blockIdx.x : own;
    const int block = part / shares, split = part % shares, first = block * (own < 0 ? LINES : OUT);
    const int there = own < 0 ? min(ranks - first, LINES) : LINES;
    __shared__ int slots[TOKENS], low[MOST_SLOTS * PARTS], high[MOST_SLOTS * PARTS], widest;
""",
    "LINES_OF": "(own < 0 ? changes + size_t(S) * 64 : w)",
    "APART": "(own < 0 ? OUT : N)",
    "THERE": "if (line + i < there)",
    "SEEK": """
    // Of all slots' `up`, what the block's lines have.
    const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S) * R * O + first;
    if (own >= 0) {
        if (threadIdx.x == 0) widest = 0;
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
        float* const to = inner + size_t(split) * rows * ranks + first;
        for (int at = threadIdx.x; at < rows * (LINES / 4); at += THREADS) {
            const int r = at / (LINES / 4), n = at % (LINES / 4) * 4;
            if (n >= there) continue;
            *reinterpret_cast<float4*>(to + size_t(r) * ranks + n) =
                *reinterpret_cast<const float4*>(sums + r * PITCH + n);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(const_cast<int*>(board), 1);
        return;
    }
""",
    "AWAIT": """
    if (threadIdx.x == 0) {
        while (acquire(board) < before) {}
        int* const counters_of_all = const_cast<int*>(board);
        if (atomicAdd(counters_of_all + 1, 1) == O / LINES - 1) counters_of_all[0] = counters_of_all[1] = 0;
    }
    __syncthreads();
    // So many loads are on their way at once: a look at what others wrote takes as long as eight chunks.
    constexpr int TOGETHER = PIECES > 8 ? 1 : PIECES > 4 ? 2 : PIECES > 2 ? 4 : 8;
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
                    #pragma unroll 4
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
