"""The sources of `expand`, in CUDA: BY_VECTOR, a vector of one token's outputs a thread, and TILED.

In TILED a block has VECTORS · 8 outputs of up to ROWS tokens, and what all slots' `up` has for those in shared memory:
it is read once for all rows, where BY_VECTOR reads it for each. With many outputs that is most of what is read.

Both add a row's ranks in the same order, so they give the same bits. T, PARTS, THREADS, MOST_RANK, AT_ONCE, VECTORS and
ROWS are constants. An entry of PLACES says what becomes of the changed product; a sum's other part has one axis where
there is none.
"""

from __future__ import annotations

from typing import Final

BY_VECTOR: Final = """
    const int O = y_shape[y_ndim - 1], N = O / PARTS, pieces = inner_shape[0], rows = inner_shape[1];
    const int S = inner_shape[2], R = inner_shape[3], tiles = (N / 8 + THREADS - 1) / THREADS;
    const int n = blockIdx.x / tiles, mine = (blockIdx.x % tiles * THREADS + threadIdx.x) * 8;
    const int o = min(mine, N - 8), slot = board[32 + n / (rows / board_shape[0])];
    const size_t at = size_t(n) * N + o;
    uint4 product[PARTS];
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        product[part] = *reinterpret_cast<const uint4*>(y + size_t(n) * O + o + part * N);
    }
    const bool there = true;
    BEFORE

    float total[PARTS][8];
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        #pragma unroll
        for (int i = 0; i < 8; ++i) total[part][i] = float(reinterpret_cast<const T*>(&product[part])[i]);
    }
    if (slot > 0) {
        // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
        const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S - slot) * R * O + o;
        const int* const spans = reinterpret_cast<const int*>(changes) + slot * 32;
        int low[PARTS], high[PARTS], most = 0;
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int* span = spans;
            int end = span[0], from = span[1], to = span[2];
            #pragma unroll 1
            while (end <= o + part * N) span += 3, end = span[0], from = span[1], to = span[2];
            low[part] = from, high[part] = to, most = max(most, to - from);
        }
        uint4 values[PARTS][AT_ONCE];
        auto look = [&](int i) {
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                #pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const int rank = low[part] + i + j;
                    if (rank < high[part]) {
                        values[part][j] = *reinterpret_cast<const uint4*>(up + size_t(rank) * O + part * N);
                    }
                }
            }
        };
        look(0);
        __shared__ float sums[MOST_RANK];
        for (int r = threadIdx.x; r < R; r += THREADS) {
            const float* const its = inner + (size_t(n) * S + slot) * R + r;
            float sum = 0.0f;
            #pragma unroll 4
            for (int piece = 0; piece < pieces; ++piece) sum += its[size_t(piece) * rows * S * R];
            sums[r] = sum;
        }
        __syncthreads();
        for (int i = 0; i < most; i += AT_ONCE) {
            if (i > 0) look(i);
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                #pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const int rank = low[part] + i + j;
                    if (rank >= high[part]) continue;
                    const T* const v = reinterpret_cast<const T*>(&values[part][j]);
                    #pragma unroll
                    for (int e = 0; e < 8; ++e) total[part][e] += sums[rank] * float(v[e]);
                }
            }
        }
    }
    if (mine >= N) return;
    uint4 result;
    T* const written = reinterpret_cast<T*>(&result);
    #pragma unroll
    for (int i = 0; i < 8; ++i) FOLLOW
    *reinterpret_cast<uint4*>(out + at) = result;
"""

TILED: Final = """
    const int O = y_shape[y_ndim - 1], N = O / PARTS, pieces = inner_shape[0], rows = inner_shape[1];
    const int S = inner_shape[2], R = inner_shape[3], shares = (rows + ROWS - 1) / ROWS;
    constexpr int LINES = THREADS / VECTORS, EACH = ROWS / LINES;
    const int begin = blockIdx.x % shares * ROWS, count = min(ROWS, rows - begin), line = threadIdx.x / VECTORS;
    const int vector = threadIdx.x % VECTORS, first = blockIdx.x / shares * VECTORS * 8, o = first + vector * 8;
    uint4 product[EACH][PARTS];
    #pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int row = begin + min(line + i * LINES, count - 1);
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            product[i][part] = *reinterpret_cast<const uint4*>(y + size_t(row) * O + o + part * N);
        }
    }
    // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
    __shared__ int slots[ROWS], low[MOST_SLOTS * PARTS], high[MOST_SLOTS * PARTS];
    const int each = rows / board_shape[0];
    for (int r = threadIdx.x; r < count; r += THREADS) slots[r] = board[32 + (begin + r) / each];
    for (int i = threadIdx.x; i < S * PARTS; i += THREADS) {
        const int* span = reinterpret_cast<const int*>(changes) + i / PARTS * 32;
        #pragma unroll 1
        while (span[0] <= first + i % PARTS * N) span += 3;
        low[i] = span[1], high[i] = span[2];
    }
    __syncthreads();

    // [slots, ranks, PARTS, VECTORS], and [rows, ranks]; slot 0 has none.
    uint4* const values = room;
    float* const sums = reinterpret_cast<float*>(room + S * R * PARTS * VECTORS);
    const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S) * R * O + first;
    const int most = S * R * PARTS * VECTORS;
    for (int from = R * PARTS * VECTORS + threadIdx.x; from < most; from += THREADS * AT_ONCE) {
        uint4 some[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int at = min(from + i * THREADS, most - 1), part = at / VECTORS % PARTS;
            const int rank = at / (VECTORS * PARTS), its = rank / R * PARTS + part;
            some[i] = {0, 0, 0, 0};
            if (rank % R >= low[its] && rank % R < high[its]) {
                some[i] = *reinterpret_cast<const uint4*>(up + size_t(rank) * O + part * N + at % VECTORS * 8);
            }
        }
        #pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (from + i * THREADS < most) values[from + i * THREADS] = some[i];
        }
    }
    #pragma unroll 2
    for (int at = threadIdx.x; at < count * R; at += THREADS) {
        const int r = at / R, slot = slots[r];
        const float* const its = inner + (size_t(begin + r) * S + slot) * R + at % R;
        float sum = 0.0f;
        if (slot > 0) {
            #pragma unroll 4
            for (int piece = 0; piece < pieces; ++piece) sum += its[size_t(piece) * rows * S * R];
        }
        sums[at] = sum;
    }
    __syncthreads();

    #pragma unroll
    for (int row = 0; row < EACH; ++row) {
        const int r = line + row * LINES;
        const bool there = r < count;
        const size_t at = size_t(begin + r) * N + o;
        BEFORE
        if (!there) continue;
        const int slot = slots[r];
        float total[PARTS][8];
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            #pragma unroll
            for (int i = 0; i < 8; ++i) total[part][i] = float(reinterpret_cast<const T*>(&product[row][part])[i]);
            if (slot == 0) continue;
            const int end = high[slot * PARTS + part];
            #pragma unroll 4
            for (int rank = low[slot * PARTS + part]; rank < end; ++rank) {
                const uint4 its = values[((slot * R + rank) * PARTS + part) * VECTORS + vector];
                const T* const v = reinterpret_cast<const T*>(&its);
                #pragma unroll
                for (int i = 0; i < 8; ++i) total[part][i] += sums[r * R + rank] * float(v[i]);
            }
        }
        uint4 result;
        T* const written = reinterpret_cast<T*>(&result);
        #pragma unroll
        for (int i = 0; i < 8; ++i) FOLLOW
        *reinterpret_cast<uint4*>(out + at) = result;
    }
"""

ROOM: Final = "extern __shared__ uint4 room[];\n"
"""What TILED has of shared memory."""

PLACES: Final = {
    "plain": {
        "BEFORE": """
        uint4 more = {0, 0, 0, 0};
        if (there && added_ndim > 1) more = *reinterpret_cast<const uint4*>(added + at);
""",
        "FOLLOW": """{
            const T changed = T(total[0][i]);
            written[i] = added_ndim > 1 ? T(float(reinterpret_cast<const T*>(&more)[i]) + float(changed)) : changed;
        }""",
    },
    "swiglu": {"BEFORE": "", "FOLLOW": "written[i] = swiglu(T(total[0][i]), T(total[1][i]));"},
}
