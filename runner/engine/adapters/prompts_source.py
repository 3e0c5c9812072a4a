"""The sources of `prompts`, in CUDA: INNER, the inner products of tokens with their row's slot, and ADD, the changes.

In INNER a block has up to TILES · 8 tokens of one row, and 16 ranks of its slot. Its WARPS share K: each takes every
WARPS-th chunk of 64 values, and their sums are added in the order of the warps. So the order of a sum depends on K and
WARPS only, and a token's inner products are the same bits whatever is beside it. Ranks are the tensor cores' 16 × 16
operand, tokens their 16 × 8 one, read as `product_source` reads them. Of a row without a change nothing is written.

In ADD a warp has 32 outputs of tokens of one row, 16 at a time: of MOST_TOKENS, or half as many until there are BLOCKS
blocks or a warp has TOKENS. Tokens are the 16 × 16 operand: eight of
their inner products, as the sum of two numbers of T, which are to half a rank's rounding what they were; outputs are
the 16 × 8 one, each rank twice. Which outputs a product has for its columns does not matter, so a thread's are eight
that follow each other. A row's ranks are added eight by eight to its rounded product.

T, WARPS, STAGES, TILES, TOKENS, MOST_TOKENS, BLOCKS and PARTS are constants; `tensor_cores` has what only a GPU can do.
An entry of PLACES says what becomes of the changed product; a sum's other part has one axis where there is none.
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
    const T* from[2 + TILES];
    from[0] = low, from[1] = high;
    float sum[TILES][4];
    #pragma unroll
    for (int i = 0; i < TILES; ++i) {
        from[2 + i] = x + (size_t(row) * tokens + begin + min(i * 8 + g, count - 1)) * K + t * 8;
        sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
    }
    // A thread reads what it has copied itself, so nobody waits for others: STAGES rounds are on their way. (Loads into
    // registers are not, as in `product_source`.)
    constexpr int COPIES = 4 + 2 * TILES, APART = STAGES * COPIES * 32;
    const int rounds = (K / 64 + WARPS - 1) / WARPS;
    uint4* const own = ring + warp * APART + lane;
    auto fetch = [&](int round) {
        const int k = (round * WARPS + warp) * 64;
        if (round < rounds) {
            #pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                copy(own + (round % STAGES * COPIES + i) * 32, from[i / 2] + k + i % 2 * 32, k < K);
            }
        }
        close_group();
    };
    #pragma unroll
    for (int round = 0; round < STAGES; ++round) fetch(round);
    #pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        wait_for_groups<STAGES - 1>();
        const uint4* const its = own + round % STAGES * COPIES * 32;
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 a = its[h * 32], c = its[(2 + h) * 32];
            #pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint4 b = its[(4 + i * 2 + h) * 32];
                multiply(sum[i], a.x, c.x, a.y, c.y, b.x, b.y);
                multiply(sum[i], a.z, c.z, a.w, c.w, b.z, b.w);
            }
        }
        fetch(round + STAGES);
    }
    // A warp's sums go where its copies were.
    __syncwarp();
    float* const sums = reinterpret_cast<float*>(ring);
    #pragma unroll
    for (int i = 0; i < TILES * 4; ++i) sums[warp * APART * 4 + i * 32 + lane] = sum[i / 4][i % 4];
    __syncthreads();
    for (int at = threadIdx.x; at < TILES * 128; at += WARPS * 32) {
        const int n = at % 16, r = at / 16;
        if (r >= count || lowest + n >= R) continue;
        // Where a warp has rank n of token r.
        const int place = ((r / 8 * 2 + n / 8) * 2 + r % 2) * 32 + n % 8 * 4 + r % 8 / 2;
        float total = 0.0f;
        #pragma unroll
        for (int v = 0; v < WARPS; ++v) total += sums[v * APART * 4 + place];
        out[(size_t(row) * tokens + begin + r) * R + lowest + n] = total;
    }
"""

ADD: Final = """
    const int tokens = y_shape[1], O = y_shape[2], N = O / PARTS, R = inner_shape[1], S = changes_shape[0];
    const int shares = (N + WARPS * 32 - 1) / (WARPS * 32);
    int step = MOST_TOKENS;
    while (step > TOKENS && y_shape[0] * ((tokens + step - 1) / step) * shares < BLOCKS) step /= 2;
    const int tiles = (tokens + step - 1) / step, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = (blockIdx.x % shares * WARPS + threadIdx.x / 32) * 32, tile = blockIdx.x / shares;
    const int row = tile / tiles, begin = tile % tiles * step, end = min(begin + step, tokens);
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
