"""The sources of `prompts`, in CUDA: INNER, the inner products of tokens with their row's slot, and ADD, the changes.

In INNER a block has up to TILES · 8 tokens of one row, and 16 ranks of its slot. Its WARPS share K: each takes every
WARPS-th chunk of 64 values, and their sums are added in the order of the warps. So the order of a sum depends on K and
WARPS only, and a token's inner products are the same bits whatever is beside it. Ranks are the tensor cores' 16 × 16
operand, tokens their 16 × 8 one, read as `product_source` reads them. Of a row without a change nothing is written.

In ADD a warp has 32 outputs of up to TOKENS tokens of one row, 16 at a time. Tokens are the 16 × 16 operand: eight of
their inner products, as the sum of two numbers of T, which are to half a rank's rounding what they were; outputs are
the 16 × 8 one, each rank twice. Which outputs a product has for its columns does not matter, so a thread's are eight
that follow each other. A row's ranks are added eight by eight to its rounded product.

T, WARPS, TILES, TOKENS and PARTS are constants; `tensor_cores` has what only a GPU can do. An entry of PLACES says what
becomes of the changed product; a sum's other part has one axis where there is none.
"""

from __future__ import annotations

from typing import Final

INNER: Final = """
    const int tokens = x_shape[1], K = x_shape[2], O = w_shape[0], S = changes_shape[0];
    const int R = (changes_shape[1] - 64) / (K + O), shares = (R + 15) / 16;
    const int tiles = (tokens + TILES * 8 - 1) / (TILES * 8);
    const int tile = blockIdx.x / shares, row = tile / tiles, begin = tile % tiles * TILES * 8;
    const int lowest = blockIdx.x % shares * 16, slot = board[32 + row], count = min(tokens - begin, TILES * 8);
    if (slot == 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // What is not there is the last one again; nobody looks at what it gives.
    const T* const down = changes + size_t(S) * 64 + size_t(slot) * R * K + t * 8;
    const T* const low = down + size_t(min(lowest + g, R - 1)) * K;
    const T* const high = down + size_t(min(lowest + g + 8, R - 1)) * K;
    const T* from[TILES];
    float sum[TILES][4];
    #pragma unroll
    for (int i = 0; i < TILES; ++i) {
        from[i] = x + (size_t(row) * tokens + begin + min(i * 8 + g, count - 1)) * K + t * 8;
        sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
    }
    #pragma unroll 2
    for (int k = warp * 64; k < K; k += WARPS * 64) {
        uint4 a[2][2], b[2][TILES];
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            a[h][0] = *reinterpret_cast<const uint4*>(low + k + h * 32);
            a[h][1] = *reinterpret_cast<const uint4*>(high + k + h * 32);
            #pragma unroll
            for (int i = 0; i < TILES; ++i) b[h][i] = *reinterpret_cast<const uint4*>(from[i] + k + h * 32);
        }
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            #pragma unroll
            for (int i = 0; i < TILES; ++i) {
                multiply(sum[i], a[h][0].x, a[h][1].x, a[h][0].y, a[h][1].y, b[h][i].x, b[h][i].y);
                multiply(sum[i], a[h][0].z, a[h][1].z, a[h][0].w, a[h][1].w, b[h][i].z, b[h][i].w);
            }
        }
    }
    float* const sums = reinterpret_cast<float*>(ring);
    #pragma unroll
    for (int i = 0; i < TILES * 4; ++i) sums[warp * TILES * 128 + i * 32 + lane] = sum[i / 4][i % 4];
    __syncthreads();
    for (int at = threadIdx.x; at < TILES * 128; at += WARPS * 32) {
        const int n = at % 16, r = at / 16;
        if (r >= count || lowest + n >= R) continue;
        // Where a warp has rank n of token r.
        const int place = ((r / 8 * 2 + n / 8) * 2 + r % 2) * 32 + n % 8 * 4 + r % 8 / 2;
        float total = 0.0f;
        #pragma unroll
        for (int v = 0; v < WARPS; ++v) total += sums[v * TILES * 128 + place];
        out[(size_t(row) * tokens + begin + r) * R + lowest + n] = total;
    }
"""

ADD: Final = """
    const int tokens = y_shape[1], O = y_shape[2], N = O / PARTS, R = inner_shape[1], S = changes_shape[0];
    const int shares = (N + WARPS * 32 - 1) / (WARPS * 32), tiles = (tokens + TOKENS - 1) / TOKENS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = (blockIdx.x % shares * WARPS + threadIdx.x / 32) * 32, tile = blockIdx.x / shares;
    const int row = tile / tiles, begin = tile % tiles * TOKENS, end = min(begin + TOKENS, tokens);
    if (first >= N) return;
    const int slot = board[32 + row];
    // Stack.packed: a span is where a part's outputs end and the ranks [low, high) that reach them.
    const int* const spans = reinterpret_cast<const int*>(changes) + slot * 32;
    const T* const up = changes + size_t(S) * changes_shape[1] - size_t(S - slot) * R * O;
    int low[PARTS], high[PARTS];
    unsigned b[PARTS][4];
    auto look = [&](int part, int from) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            alignas(4) T two[2];
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int rank = from + t * 2 + i;
                const T* const its = up + size_t(rank) * O + part * N + first + g / 2 * 8 + j * 2 + g % 2;
                two[i] = rank < high[part] ? *its : T(0.0f);
            }
            b[part][j] = *reinterpret_cast<const unsigned*>(two);
        }
    };
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int* span = spans;
        #pragma unroll 1
        while (span[0] <= first + part * N) span += 3;
        low[part] = span[1], high[part] = slot > 0 ? span[2] : span[1];
        look(part, low[part]);
    }
    BEFORE
    // What 16 tokens have is loaded while those before them are computed.
    uint4 product[2][PARTS], product_after[2][PARTS];
    float value[PARTS][2][2], value_after[PARTS][2][2];
    auto place_of = [&](int token, int h) {
        // Tokens that are not there are the last one again.
        return size_t(row) * tokens + min(token + g + h * 8, end - 1);
    };
    auto weigh = [&](float (&its)[2][2], int part, int from, int token) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int rank = from + t * 2 + i % 2;
            its[i / 2][i % 2] = rank < high[part] ? inner[place_of(token, i / 2) * R + rank] : 0.0f;
        }
    };
    auto fetch = [&](int token) {
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const T* const from = y + place_of(token, h) * O + part * N + first + t * 8;
                product_after[h][part] = *reinterpret_cast<const uint4*>(from);
            }
            weigh(value_after[part], part, low[part], token);
        }
        FETCH
    };
    fetch(begin);
    #pragma unroll 1
    for (int token = begin; token < end; token += 16) {
        #pragma unroll
        for (int i = 0; i < PARTS * 4; ++i) {
            product[i % 2][i / 4] = product_after[i % 2][i / 4];
            value[i / 4][i / 2 % 2][i % 2] = value_after[i / 4][i / 2 % 2][i % 2];
        }
        TAKE
        if (token + 16 < end) fetch(token + 16);
        float sum[PARTS][4][4];
        #pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            #pragma unroll
            for (int i = 0; i < 16; ++i) {
                const T* const eight = reinterpret_cast<const T*>(&product[i / 8][part]);
                sum[part][i % 8 / 2][i / 8 * 2 + i % 2] = float(eight[i % 8]);
            }
            #pragma unroll 1
            for (int from = low[part]; from < high[part]; from += 8) {
                if (high[part] - low[part] > 8) {
                    look(part, from);
                    weigh(value[part], part, from, token);
                }
                unsigned a[2][2];
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    alignas(4) T most[2];
                    alignas(4) T rest[2];
                    #pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        most[i] = T(value[part][h][i]), rest[i] = T(value[part][h][i] - float(most[i]));
                    }
                    a[0][h] = *reinterpret_cast<const unsigned*>(most);
                    a[1][h] = *reinterpret_cast<const unsigned*>(rest);
                }
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    multiply(sum[part][j], a[0][0], a[0][1], a[1][0], a[1][1], b[part][j], b[part][j]);
                }
            }
        }
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (token + g + h * 8 >= end) continue;
            uint4 result;
            T* const written = reinterpret_cast<T*>(&result);
            #pragma unroll
            for (int i = 0; i < 8; ++i) {
                const T changed = T(sum[0][i / 2][h * 2 + i % 2]);
                FOLLOW
            }
            *reinterpret_cast<uint4*>(out + place_of(token, h) * N + first + t * 8) = result;
        }
    }
"""

PLACES: Final = {
    "plain": {
        "BEFORE": "uint4 more[2] = {}, more_after[2] = {};",
        "FETCH": """
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const T* const from = added + place_of(token, h) * N + first + t * 8;
            if (added_ndim > 1) more_after[h] = *reinterpret_cast<const uint4*>(from);
        }
""",
        "TAKE": "more[0] = more_after[0], more[1] = more_after[1];",
        "FOLLOW": """
                const T other = reinterpret_cast<const T*>(&more[h])[i];
                written[i] = added_ndim > 1 ? T(float(other) + float(changed)) : changed;
""",
    },
    "swiglu": {
        "BEFORE": "",
        "FETCH": "",
        "TAKE": "",
        "FOLLOW": "written[i] = swiglu(changed, T(sum[PARTS - 1][i / 2][h * 2 + i % 2]));",
    },
}
