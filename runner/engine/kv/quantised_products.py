"""A part of `quantised_source`: the queries as a product takes them, and a tile's two products."""

from __future__ import annotations

from typing import Final

QUERIES: Final = """
    // A thread has lines r and r + 8. Of each group a quarter of the columns: those of its words of a key, in the order
    // in which `codes_of` takes them apart.
    const bool tall = used > 8;
    uint32_t query[PIECES][GROUPS][STEPS][4];
    float unit[2], all[GROUPS][2], added[GROUPS][2];
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float* const line = asked + (r + h * 8) * (D + 4) + c * (GROUP / 4);
        float largest = 0.0f;
        #pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            largest = highest(largest, fabsf(line[i / (GROUP / 4) * GROUP + i % (GROUP / 4)]));
        }
        largest = of_all_four(highest<float>, largest);
        const uint32_t exponent = lowest(__float_as_uint(largest) >> 23, 253u);
        const float smaller = __uint_as_float((254u - exponent) << 23);
        unit[h] = __uint_as_float(exponent << 23) * SCALE;
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            all[of][h] = added[of][h] = 0.0f;
            #pragma unroll
            for (int i = 0; i < STEPS * 2; ++i) {
                // Codes `i` of the two halves of a word.
                const int column = of * GROUP + i / PAIRS * PER_WORD + i % PAIRS;
                const float times = BITS == 4 && i % 2 ? smaller / 16 : smaller;
                float low = line[column] * times, high = line[column + PAIRS] * times;
                #pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    const uint32_t both = halves_of(low, high);
                    query[piece][of][i / 2][i % 2 * 2 + h] = both;
                    low -= low_of(both);
                    high -= high_of(both);
                    added[of][h] += 1024.0f * (low_of(both) + high_of(both));
                    all[of][h] += (BITS == 4 && i % 2 ? 16.0f : 1.0f) * (low_of(both) + high_of(both));
                }
            }
            all[of][h] = of_all_four(plus, all[of][h]);
            added[of][h] = of_all_four(plus, added[of][h]);
        }
    }
"""

ATTEND: Final = """
    float top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f}, offset[GROUPS][2], sum[GROUPS][TILES][4];
    #pragma unroll
    for (int of = 0; of < GROUPS; ++of) {
        offset[of][0] = offset[of][1] = 0.0f;
        #pragma unroll
        for (int j = 0; j < TILES; ++j) sum[of][j][0] = sum[of][j][1] = sum[of][j][2] = sum[of][j][3] = 0.0f;
    }
    auto attend = [&](int tile, const unsigned char* here) {
        // Keys are taken in such an order that a thread has the scores of keys 4 c to 4 c + 3.
        float score[2][4], reach[4];
        T numbers[4][4 * GROUPS];
        #pragma unroll
        for (int which = 0; which < 4; ++which) {
            uint32_t raw[sizeof(T) * GROUPS];
            words(here + 2 * PLANE + which * NUMBERS + c * int(sizeof(raw)), raw);
            memcpy(numbers[which], raw, sizeof(raw));
        }
        #pragma unroll
        for (int m = 0; m < 4; ++m) score[0][m] = score[1][m] = reach[m] = 0.0f;
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            #pragma unroll
            for (int two = 0; two < 2; ++two) {
                constexpr int WORDS = GROUP / 4 / PER_WORD;
                uint32_t key[WORDS];
                words(here + place(r / 2 * 4 + two * 2 + r % 2) + (of * 4 + c) * WORDS * 4, key);
                float found[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                #pragma unroll
                for (int i = 0; i < STEPS; ++i) {
                    const uint32_t b0 = codes_of<BITS>(key[i * 2 / PAIRS], i * 2 % PAIRS);
                    const uint32_t b1 = codes_of<BITS>(key[i * 2 / PAIRS], i * 2 % PAIRS + 1);
                    #pragma unroll
                    for (int piece = 0; piece < PIECES; ++piece) multiply(found, query[piece][of][i], b0, b1);
                }
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int m = two * 2 + e;
                    const float scale = float(numbers[0][m * GROUPS + of]), bias = float(numbers[1][m * GROUPS + of]);
                    #pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        score[h][m] += (found[h * 2 + e] - added[of][h]) * scale + all[of][h] * bias;
                    }
                    reach[m] = highest(reach[m], fabsf(float(numbers[2][m * GROUPS + of])));
                }
            }
        }
        #pragma unroll
        for (int m = 0; m < 4; ++m) reach[m] = log2f(reach[m]);
        // What a line's weights are relative to, which may be less than the largest by a little: it seldom changes.
        const bool inner = tile * KEYS + KEYS <= least + 1 && (WINDOW == 0 || tile * KEYS > at - WINDOW);
        float most[2] = {NEVER, NEVER};
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int limit = least + (r + h * 8) / HEADS;
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int p = tile * KEYS + c * 4 + m;
                const bool seen = inner || (p <= limit && (WINDOW == 0 || p > limit - WINDOW));
                score[h][m] = seen ? score[h][m] * unit[h] : NEVER;
                most[h] = highest(most[h], seen ? score[h][m] + reach[m] : NEVER);
            }
        }
        if (__any_sync(0xffffffffu, most[0] > top[0] + 8.0f || most[1] > top[1] + 8.0f)) {
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float best = highest(top[h], of_all_four(highest<float>, most[h])), kept = exp2f(top[h] - best);
                top[h] = best;
                total[h] *= kept;
                #pragma unroll
                for (int of = 0; of < GROUPS; ++of) {
                    offset[of][h] *= kept;
                    #pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        sum[of][j][h * 2] *= kept;
                        sum[of][j][h * 2 + 1] *= kept;
                    }
                }
            }
        }
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                score[h][m] = h == 0 || tall ? exp2f(score[h][m] - top[h]) : 0.0f;
                total[h] += score[h][m];
            }
        }
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            float weight[2][4];
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                const float scale = float(numbers[2][m * GROUPS + of]);
                const float bias = float(numbers[3][m * GROUPS + of]) + MIDDLE * scale;
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    weight[h][m] = score[h][m] * scale;
                    offset[of][h] += score[h][m] * bias;
                }
            }
            uint32_t weights[PIECES][4];
            #pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float &low = weight[i % 2][i / 2 * 2], &high = weight[i % 2][i / 2 * 2 + 1];
                    weights[piece][i] = halves_of(low, high);
                    low -= low_of(weights[piece][i]);
                    high -= high_of(weights[piece][i]);
                }
            }
            uint32_t value[4][(MINE + 1) / 2];
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                const unsigned char* from = here + PLANE + place(c * 4 + m) + (of * 8 + r) * MINE * 2;
                if constexpr (MINE == 1) value[m][0] = *reinterpret_cast<const uint16_t*>(from);
                else words(from, value[m]);
            }
            #pragma unroll
            for (int u = 0; u < MINE; ++u) {
                const uint32_t which = u % 2 ? 0x7632 : 0x5410;
                const uint32_t first = __byte_perm(value[0][u / 2], value[1][u / 2], which);
                const uint32_t second = __byte_perm(value[2][u / 2], value[3][u / 2], which);
                #pragma unroll
                for (int i = 0; i < PAIRS; ++i) {
                    const uint32_t b0 = centred_of<BITS>(first, i), b1 = centred_of<BITS>(second, i);
                    #pragma unroll
                    for (int piece = 0; piece < PIECES; ++piece) {
                        multiply(sum[of][u * PAIRS + i], weights[piece], b0, b1);
                    }
                }
            }
        }
    };
"""
