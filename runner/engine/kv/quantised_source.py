"""The source of `quantised_kernel`, in CUDA: attention to keys and values in BITS bits, by tensor cores.

A block takes up to SEVERAL tokens of a row, and HEADS of the query heads that share key head `head_of_keys`: these are
the columns of a product whose lines are keys, so that keys are read once for all of them, and eight columns do for most
models' steps. Its warps take turns at tiles of 16 keys, and so do the blocks that share a row's keys (as in
Flash-Decoding, Dao et al. 2023): which tile a warp has first does not depend on how long the row is, so that it is on
its way before anything is known of the row. A warp copies its tiles into shared memory STAGES ahead.

Of two neighbouring keys the second lies eight lines behind the first, in a tile as in a product: what a thread has of
scores is of two keys whose scales are next to each other. Vectors of a line change places, so that eight lines give
one each without a conflict of banks. Scores leave a thread with two keys of two queries; weights, in 16 bits, and each
8 × 8 of them transposed, are what the values' product takes (PTX ISA, mma.m16n8k16), whose lines are columns.

Nothing is unpacked but to halves. A code put into the mantissa of 1024 is 1024 + w (4 bits: also 1024 + 16 w), exactly,
in one operation for two of them; for keys, what that adds to a product is known from the queries alone, and taken off.
With k = s·w + b, a query's product is s·Σ q·w + b·Σ q, and the sum of weighted values is Σ (p·s)·w + Σ p·b, where codes
are counted from their middle, so that sums stay small. Weights are relative to the largest of score + log2 s, not of
scores: so the largest p·s is about 1, whatever a model's values are, and halves do for all. Queries are made about 1 as
well, by a power of two; where they are float32, which no half holds, they and the weights are two halves each (PIECES).

Only blocks that see the call's own tokens pack these; one of them writes them. Blocks that share a row's keys leave
what they have in `partial`, and the last of them, by `counters`, merges that.

T, D (a head's width), BITS, GROUP (values to a scale), KEY_HEADS, PARTS and HEADS (query heads of a key head are
PARTS · HEADS), SETS (eights of queries of a block), WARPS, STAGES, FEW (tokens of a row at most), ROTATED, TRADITIONAL
and WINDOW (0 for none) are constants, and so are CROWD (blocks that keep a GPU busy), SHARE (tiles that are worth a
block where there are so many), MOST_SPLITS, SCALE, of powers of two, and LEAST and MOST, with which MLX begins to look
for the range of a group.
"""

from __future__ import annotations

from typing import Final

from runner.engine.kv.quantised_merge import MERGE
from runner.engine.kv.quantised_new import NEW
from runner.engine.kv.quantised_products import ATTEND, QUERIES

_START: Final = """
    constexpr int PER_WORD = 32 / BITS, PAIRS = PER_WORD / 2, LINE = D / PER_WORD, GROUPS = D / GROUP;
    constexpr int KEYS = 16, LINES = SETS * 8, SEVERAL = LINES / HEADS, THREADS = WARPS * 32;
    constexpr int PIECES = sizeof(T) == 4 ? 2 : 1;
    // Vectors of 16 bytes in a line, and in a group of it; products of 16 columns to a vector.
    constexpr int VECTORS = LINE / 4, WIDE = VECTORS / GROUPS, PRODUCTS = PAIRS / 2;
    constexpr float MIDDLE = 1 << (BITS - 1), NONE = -1e30f, NEVER = -1e38f;
    // Bytes: of a tile's lines, of its scales, of all that is copied of it, and of what a warp has at the end.
    constexpr int PLANE = KEYS * LINE * 4, NUMBERS = KEYS * GROUPS * sizeof(T), STAGE = 2 * PLANE + 4 * NUMBERS;
    constexpr int LONG = D + 4, SUMS = LINES * LONG * 4, APART = STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS;
    // Values of float32 from the beginning to what warps have beside their sums: all of it, or what splits count for.
    constexpr int FRESH = FEW * (2 * LINE * 4 + (2 * D + 4 * GROUPS) * sizeof(T));
    constexpr int USED = (WARPS * APART + LINES * D * int(sizeof(T)) + FRESH) / 4;
    constexpr int ROOM = USED > LINES * MOST_SPLITS ? USED : LINES * MOST_SPLITS;

    const int tokens = queries_shape[2], splits = counters_shape[0];
    const int sets = FEW == 1 ? 1 : (tokens + SEVERAL - 1) / SEVERAL;
    // A division by what is only known here takes as long as a load. Splits are a power of two.
    const int split = blockIdx.x & (splits - 1), base_block = blockIdx.x >> (__ffs(splits) - 1);
    const int token = FEW == 1 ? 0 : base_block % sets * SEVERAL, piece = FEW == 1 ? base_block : base_block / sets;
    const int part = piece % PARTS, head_of_keys = piece / PARTS % KEY_HEADS, row = piece / (PARTS * KEY_HEADS);
    const int start = starts[row], head = (head_of_keys * PARTS + part) * HEADS;
    const int count = lowest(SEVERAL, tokens - token), used = count * HEADS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool crowded = queries_shape[0] * KEY_HEADS * PARTS * sets >= CROWD;

    unsigned char* const bytes = reinterpret_cast<unsigned char*>(memory);
    unsigned char* const ring = bytes + warp * APART;
    T* const asked = reinterpret_cast<T*>(bytes + WARPS * APART);
    uint32_t* const fresh = reinterpret_cast<uint32_t*>(asked + LINES * D);
    T* const plain = reinterpret_cast<T*>(fresh + 2 * FEW * LINE);
    T* const fresh_numbers = plain + 2 * FEW * D;
    auto line_of = [&](const auto* held, const auto& strides, long p) {
        return held + row * strides[0] + head_of_keys * strides[1] + p * strides[2];
    };
    // Keys' scales and biases, and those of values.
    auto numbers_of = [&](int which, long p) {
        return which == 0 ? line_of(held_key_scales, held_key_scales_strides, p)
            : which == 1 ? line_of(held_key_biases, held_key_biases_strides, p)
            : which == 2 ? line_of(held_value_scales, held_value_scales_strides, p)
            : line_of(held_value_biases, held_value_biases_strides, p);
    };
    auto codes_at = [&](int what, long p) {
        return what ? line_of(held_values, held_values_strides, p) : line_of(held_keys, held_keys_strides, p);
    };
    // Where in a tile a vector of line `n` is, and which line a key has.
    auto place = [](int n, int vector) {
        constexpr int TURNS = VECTORS % 8 == 0 ? 8 : VECTORS % 4 == 0 ? 4 : VECTORS % 2 == 0 ? 2 : 1;
        return (n * VECTORS + (vector ^ n * TURNS / 8 % TURNS)) * 16;
    };
    auto slot = [](int key) { return key / 2 + key % 2 * 8; };
"""
"""Which tokens, heads and keys are the block's."""

_COPY: Final = """
    // Kept pieces of other rows may begin anywhere.
    unsigned skew = 0;
    #pragma unroll
    for (int i = 0; i < 4; ++i) skew |= unsigned(reinterpret_cast<size_t>(numbers_of(i, 0))) % 16;
    const bool whole = skew == 0;
    // What a thread copies of each tile, whose lines lie next to each other: vectors of codes, and of scales.
    constexpr int CODES = (KEYS * VECTORS + 31) / 32, EACH = NUMBERS / 16, OTHERS = (4 * EACH + 31) / 32;
    const unsigned char *code[2], *number[OTHERS];
    #pragma unroll
    for (int what = 0; what < 2; ++what) {
        code[what] = reinterpret_cast<const unsigned char*>(codes_at(what, 0) + lane * 4);
    }
    int to_code[CODES];
    #pragma unroll
    for (int i = 0; i < CODES; ++i) {
        const int n = lane + i * 32;
        to_code[i] = place(slot(n / VECTORS % KEYS), n % VECTORS);
        // Else it would be reckoned again for each tile.
        asm("" : "+r"(to_code[i]));
    }
    #pragma unroll
    for (int i = 0; i < OTHERS; ++i) {
        const int n = lane + i * 32;
        number[i] = reinterpret_cast<const unsigned char*>(numbers_of(n < 4 * EACH ? n / EACH : 0, 0)) + n % EACH * 16;
    }
    // All of a tile, which planes end with: what is not written yet, or is by another block right now, `complete`
    // replaces.
    auto fetch = [&](unsigned char* to, int tile) {
        #pragma unroll
        for (int what = 0; what < 2; ++what) {
            #pragma unroll
            for (int i = 0; i < CODES; ++i) {
                if (lane + i * 32 >= KEYS * VECTORS) continue;
                copy(to + what * PLANE + to_code[i], code[what] + (long long)tile * PLANE + i * 512);
            }
        }
        #pragma unroll
        for (int i = 0; i < OTHERS; ++i) {
            const int n = lane + i * 32;
            if (n >= 4 * EACH) continue;
            const unsigned char* const from = number[i] + tile * NUMBERS;
            T* const there = reinterpret_cast<T*>(to + 2 * PLANE + n * 16);
            if (whole) {
                copy(there, from);
                continue;
            }
            #pragma unroll
            for (int e = 0; e < 16 / int(sizeof(T)); ++e) there[e] = reinterpret_cast<const T*>(from)[e];
        }
    };
    const bool early = WINDOW == 0 && (split == 0 || !crowded);
    const int mine = split * WARPS + warp;
    if (early && mine < int(held_keys_shape[2]) / KEYS) fetch(ring, mine);

    const int least = start + token, at = least + count - 1;
    const int bottom = WINDOW > 0 && least >= WINDOW ? least - WINDOW + 1 : 0;
    const int low = bottom / KEYS, tiles = at / KEYS + 1 - low;
    // A row has fewer blocks than it may have where that is all it is worth.
    constexpr int WORTH = SHARE > WARPS ? SHARE : WARPS;
    const int wanted = crowded ? (tiles + WORTH - 1) / WORTH : (tiles + WARPS - 1) / WARPS;
    const int blocks = lowest(wanted, splits);
    if (split >= blocks) {
        wait_for_groups<0>();
        return;
    }
    // A warp's tiles, counted from the first that is seen: `mine`, and every `apart`-th.
    const int apart = blocks * WARPS;
    auto follow = [&](int tile, unsigned char* to) {
        if (tile < tiles) fetch(to, low + tile);
        close_group();
    };
    if (early) close_group();
    #pragma unroll 1
    for (int i = early ? 1 : 0; i < STAGES; ++i) follow(mine + i * apart, ring + i * STAGE);
"""

_LOOP: Final = """
    // What is not held yet, into a tile that has come. Behind the last any line will do: its weight is zero.
    auto complete = [&](int tile, unsigned char* to) {
        const int from = highest(0, start - tile * KEYS), last = token + count - 1;
        auto own = [&](int key) { return lowest(tile * KEYS + key - start, last); };
        for (int i = from * LINE + lane; i < KEYS * LINE; i += 32) {
            const int key = i / LINE, word = i % LINE;
            #pragma unroll
            for (int what = 0; what < 2; ++what) {
                reinterpret_cast<uint32_t*>(to + what * PLANE + place(slot(key), word / 4))[word % 4] =
                    fresh[(what * FEW + own(key)) * LINE + word];
            }
        }
        for (int i = from * GROUPS + lane; i < KEYS * GROUPS; i += 32) {
            #pragma unroll
            for (int which = 0; which < 4; ++which) {
                reinterpret_cast<T*>(to + 2 * PLANE)[which * KEYS * GROUPS + i] =
                    fresh_numbers[(which * FEW + own(i / GROUPS)) * GROUPS + i % GROUPS];
            }
        }
    };
    unsigned char* here = ring;
    #pragma unroll 1
    for (int i = mine; i < tiles; i += apart) {
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        if ((low + i) * KEYS + KEYS > start) {
            complete(low + i, here);
            __syncwarp();
        }
        attend(low + i, here);
        __syncwarp();
        follow(i + STAGES * apart, here);
        here = here + STAGE < ring + STAGES * STAGE ? here + STAGE : ring;
    }
"""

SOURCE: Final = _START + _COPY + NEW + QUERIES + ATTEND + _LOOP + MERGE
