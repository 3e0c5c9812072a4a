"""The source of `quantised_kernel`, in CUDA: attention to keys and values in BITS bits, by tensor cores.

A block takes up to SEVERAL tokens of a row, and HEADS of the query heads that share key head `g`: these are the up to
16 lines of a product, so keys are read once for all of them. Its warps take turns at tiles of 16 keys, which each
copies into shared memory STAGES tiles ahead. As in FlashAttention-2 (Dao 2023), what the scores' product leaves in a
thread is what the values' product takes from it, once it is a weight.

Nothing is unpacked but to halves. A code put into the mantissa of 1024 is 1024 + w (4 bits: also 1024 + 16 w), exactly,
in one operation for two of them; for keys, what that adds to a product is known from the queries alone, and taken off.
With k = s·w + b, a query's product is s·Σ q·w + b·Σ q, and the sum of weighted values is Σ (p·s)·w + Σ p·b, where codes
are counted from their middle, so that sums stay small. Weights are relative to the largest of score + log2 s, not of
scores: so the largest p·s is about 1, whatever a model's values are, and halves do for all. Queries are made about 1 as
well, by a power of two; where they are float32, which no half holds, they and the weights are two halves each (PIECES).

Only blocks that see the call's own tokens rotate and pack these; one of them writes them. Blocks that share a row's
keys (as in Flash-Decoding, Dao et al. 2023) leave what they have in `partial`, and the last of them, by `counters`,
merges that.

T, D (a head's width), BITS, GROUP (values to a scale), HEADS, WARPS, STAGES, FEW (tokens of a row at most), ROTATED,
TRADITIONAL and WINDOW (0 for none) are constants, and so are SCALE, of powers of two, and LEAST and MOST, with which
MLX begins to look for the range of a group.
"""

from __future__ import annotations

from typing import Final

from runner.engine.kv.attention_source import ROTATE
from runner.engine.kv.quantised_merge import MERGE
from runner.engine.kv.quantised_new import NEW
from runner.engine.kv.quantised_products import ATTEND, QUERIES

_START: Final = """
    constexpr int PER_WORD = 32 / BITS, PAIRS = PER_WORD / 2, LINE = D / PER_WORD, GROUPS = D / GROUP;
    constexpr int KEYS = 16, LINES = 16, SEVERAL = LINES / HEADS, THREADS = WARPS * 32;
    constexpr int PIECES = sizeof(T) == 4 ? 2 : 1;
    constexpr int STEPS = GROUP / 16, TILES = GROUP / 8, MINE = TILES * BITS / 16;
    constexpr uint32_t MASK = (1u << BITS) - 1u;
    constexpr float MIDDLE = 1 << (BITS - 1), NONE = -1e30f, NEVER = -1e38f;
    // Bytes: from four lines of a tile to the next four (no two threads read one bank of values), of a tile's lines, of
    // its scales, and of all that is copied of it.
    constexpr int FOUR = LINE * 16 + 32, PLANE = KEYS / 4 * FOUR, NUMBERS = KEYS * GROUPS * sizeof(T);
    constexpr int STAGE = 2 * PLANE + 4 * NUMBERS;

    const int tokens = queries_shape[2], groups = keys_shape[1], shared = queries_shape[1] / groups;
    const int splits = counters_shape[0], sets = (tokens + SEVERAL - 1) / SEVERAL;
    int block = blockIdx.x;
    const int split = block % splits;
    block /= splits;
    const int base_block = block;
    const int token = block % sets * SEVERAL;
    block /= sets;
    const int part = block % (shared / HEADS);
    block /= shared / HEADS;
    const int g = block % groups, row = block / groups;
    const int head = g * shared + part * HEADS;
    const int count = lowest(SEVERAL, tokens - token), used = count * HEADS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int start = starts[row], least = start + token, at = least + count - 1;
    // Tiles that the block's tokens see, and those of them that are the split's: `begin` to `end` - 1.
    const int low = WINDOW > 0 ? highest(0, least - WINDOW + 1) : 0;
    const int tiles = at / KEYS + 1 - low / KEYS, span = (tiles + splits - 1) / splits;
    const int begin = low / KEYS + split * span, end = lowest(begin + span, low / KEYS + tiles);
    const int rounds = (end - begin + WARPS - 1) / WARPS;

    unsigned char* const bytes = reinterpret_cast<unsigned char*>(memory);
    unsigned char* const ring = bytes + warp * STAGES * STAGE;
    float* const asked = reinterpret_cast<float*>(bytes + WARPS * STAGES * STAGE);
    uint32_t* const fresh = reinterpret_cast<uint32_t*>(asked + LINES * (D + 4));
    T* const fresh_numbers = reinterpret_cast<T*>(fresh + 2 * FEW * LINE);
    T* const plain = fresh_numbers + 4 * FEW * GROUPS;
    auto line_of = [&](const auto* held, const auto& strides, long p) {
        return held + row * strides[0] + g * strides[1] + p * strides[2];
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
    auto place = [](int key) { return key / 4 * FOUR + key % 4 * LINE * 4; };
"""

_COPY: Final = """
    // Kept pieces of other rows may begin anywhere.
    bool whole = true;
    #pragma unroll
    for (int i = 0; i < 4; ++i) whole = whole && reinterpret_cast<size_t>(numbers_of(i, 0)) % 16 == 0;
    auto fetch = [&](int round) {
        const int tile = begin + round * WARPS + warp;
        unsigned char* const to = ring + round % STAGES * STAGE;
        if (tile < end) {
            constexpr int CHUNKS = LINE / 4, EACH = NUMBERS / 16;
            #pragma unroll
            for (int i = lane; i < 2 * KEYS * CHUNKS; i += 32) {
                const int what = i / (KEYS * CHUNKS), key = i / CHUNKS % KEYS, chunk = i % CHUNKS;
                const int p = tile * KEYS + key;
                if (p < start) copy(to + what * PLANE + place(key) + chunk * 16, codes_at(what, p) + chunk * 4);
            }
            if (whole) {
                #pragma unroll
                for (int i = lane; i < 4 * EACH; i += 32) {
                    const int key = i % EACH * 16 / int(GROUPS * sizeof(T)), p = tile * KEYS;
                    const auto* from = reinterpret_cast<const unsigned char*>(numbers_of(i / EACH, p)) + i % EACH * 16;
                    if (p + key < start) copy(to + 2 * PLANE + i * 16, from);
                }
            } else {
                for (int i = lane; i < 4 * KEYS * GROUPS; i += 32) {
                    const int p = tile * KEYS + i / GROUPS % KEYS;
                    const T* from = numbers_of(i / (KEYS * GROUPS), p);
                    if (p < start) reinterpret_cast<T*>(to + 2 * PLANE)[i] = from[i % GROUPS];
                }
            }
        }
        close_group();
    };
    // What is not held yet, into a tile that has come. Beyond what is seen any line will do: its weight is zero.
    auto complete = [&](int tile, unsigned char* to) {
        const int from = highest(0, start - tile * KEYS), last = token + count - 1;
        auto own = [&](int key) { return lowest(tile * KEYS + key - start, last); };
        for (int i = from * LINE + lane; i < KEYS * LINE; i += 32) {
            const int key = i / LINE, word = i % LINE;
            #pragma unroll
            for (int what = 0; what < 2; ++what) {
                reinterpret_cast<uint32_t*>(to + what * PLANE + place(key))[word] =
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
    #pragma unroll
    for (int round = 0; round < STAGES; ++round) fetch(round);
"""

_LOOP: Final = """
    for (int round = 0; round < rounds; ++round) {
        const int tile = begin + round * WARPS + warp;
        unsigned char* const here = ring + round % STAGES * STAGE;
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        if (tile < end && tile * KEYS + KEYS > start) {
            complete(tile, here);
            __syncwarp();
        }
        if (tile < end) attend(tile, here);
        __syncwarp();
        fetch(round + STAGES);
    }
"""

SOURCE: Final = _START + ROTATE + _COPY + NEW + QUERIES + ATTEND + _LOOP + MERGE
