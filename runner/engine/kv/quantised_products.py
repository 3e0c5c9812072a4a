"""A part of `quantised_source`: the queries as a product takes them, and a tile's two products."""

from __future__ import annotations

from typing import Final

QUERIES: Final = """
    // A thread has query `g` of each set: of every vector the columns of word `t` of a key, in the order in which
    // `codes_of` takes them apart. It has the scores, and so the sums of columns, of queries 2 t and 2 t + 1.
    uint32_t query[PIECES][SETS][D / 16][2];
    float unit[SETS][2], all[GROUPS][SETS][2], added[GROUPS][SETS][2];
    #pragma unroll
    for (int n = 0; n < SETS; ++n) {
        T line[VECTORS][PER_WORD];
        float largest = 0.0f;
        #pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            uint32_t raw[PER_WORD * sizeof(T) / 4];
            words(asked + (n * 8 + g) * D + (v * 4 + t) * PER_WORD, raw);
            memcpy(line[v], raw, sizeof(raw));
            #pragma unroll
            for (int i = 0; i < PER_WORD; ++i) {
                line[v][i] = n * 8 + g < used ? line[v][i] : T(0.0f);
                largest = larger(largest, fabsf(float(line[v][i])));
            }
        }
        largest = of_all_four(larger, largest);
        const uint32_t exponent = lowest(__float_as_uint(largest) >> 23, 253u);
        const float smaller = __uint_as_float((254u - exponent) << 23);
        auto for_scores = [&](float its, float (&to)[2]) {
            #pragma unroll
            for (int q = 0; q < 2; ++q) to[q] = __shfl_sync(0xffffffffu, its, (t * 2 + q) * 4);
        };
        for_scores(__uint_as_float(exponent << 23) * SCALE, unit[n]);
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            float sum = 0.0f, more = 0.0f;
            #pragma unroll
            for (int i = 0; i < WIDE * PAIRS; ++i) {
                // Codes `i` of the two halves of a word.
                const int v = of * WIDE + i / PAIRS, code = i % PAIRS, step = v * PRODUCTS + code / 2;
                const float times = BITS == 4 && code % 2 ? smaller / 16 : smaller;
                float low = float(line[v][code]) * times, high = float(line[v][code + PAIRS]) * times;
                #pragma unroll
                for (int piece = 0; piece < PIECES; ++piece) {
                    const uint32_t both = halves_of(low, high);
                    query[piece][n][step][code % 2] = both;
                    low -= low_of(both);
                    high -= high_of(both);
                    more += 1024.0f * (low_of(both) + high_of(both));
                    sum += (BITS == 4 && code % 2 ? 16.0f : 1.0f) * (low_of(both) + high_of(both));
                }
            }
            for_scores(of_all_four(plus, sum), all[of][n]);
            for_scores(of_all_four(plus, more), added[of][n]);
        }
    }
"""

_SCORES: Final = """
    // Two vectors of all lines, or one: of each, those of the first eight lines, then those of the others. A thread
    // points at one of them; other vectors of its line are where it says, but for the bits that are theirs.
    constexpr int BOTH = WIDE % 2 == 0 ? 2 : 1;
    const int line_at = lane % 16 * VECTORS * 16;
    const int turn = place(lane % 16, BOTH == 2 ? lane / 16 : 0) - line_at;
    auto there = [&](const unsigned char* from, int vector) { return from + line_at + (turn ^ vector * 16); };
    auto score_of = [&](const unsigned char* here, const T (&numbers)[4][2 * GROUPS], float (&score)[SETS][4]) {
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            // Two sums, of which neither waits for the other.
            float found[SETS][2][4];
            #pragma unroll
            for (int i = 0; i < SETS * 8; ++i) found[i / 8][i / 4 % 2][i % 4] = 0.0f;
            #pragma unroll
            for (int v = of * WIDE; v < (of + 1) * WIDE; v += BOTH) {
                uint32_t key[BOTH * 2];
                matrices<false>(key, there(here, v));
                #pragma unroll
                for (int i = 0; i < BOTH * PRODUCTS; ++i) {
                    const uint32_t first = key[i / PRODUCTS * 2], second = key[i / PRODUCTS * 2 + 1];
                    const int code = i % PRODUCTS * 2;
                    const uint32_t a[4] = {codes_of<BITS>(first, code), codes_of<BITS>(second, code),
                                           codes_of<BITS>(first, code + 1), codes_of<BITS>(second, code + 1)};
                    #pragma unroll
                    for (int n = 0; n < SETS; ++n) {
                        #pragma unroll
                        for (int piece = 0; piece < PIECES; ++piece) {
                            const uint32_t (&b)[2] = query[piece][n][v * PRODUCTS + i];
                            multiply(found[n][(i + v * PRODUCTS) % 2], a, b[0], b[1]);
                        }
                    }
                }
            }
            #pragma unroll
            for (int i = 0; i < SETS * 4; ++i) {
                const int n = i / 4, e = i / 2 % 2, q = i % 2;
                const float scale = float(numbers[0][e * GROUPS + of]), bias = float(numbers[1][e * GROUPS + of]);
                const float more = BITS == 8 ? 1024.0f * all[of][n][q] : added[of][n][q];
                const float its = (found[n][0][i % 4] - more + found[n][1][i % 4]) * scale + all[of][n][q] * bias;
                score[n][i % 4] = of == 0 ? its : score[n][i % 4] + its;
            }
        }
    };
"""

_VALUES: Final = """
    auto sum_up = [&](const unsigned char* here, const T (&numbers)[4][2 * GROUPS], const float (&score)[SETS][4]) {
        #pragma unroll
        for (int of = 0; of < GROUPS; ++of) {
            uint32_t weights[PIECES][SETS][2];
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float scale = float(numbers[2][e * GROUPS + of]);
                const float bias = float(numbers[3][e * GROUPS + of]) + MIDDLE * scale;
                #pragma unroll
                for (int n = 0; n < SETS; ++n) {
                    float low = score[n][e * 2] * scale, high = score[n][e * 2 + 1] * scale;
                    offset[of][n][0] += score[n][e * 2] * bias;
                    offset[of][n][1] += score[n][e * 2 + 1] * bias;
                    #pragma unroll
                    for (int piece = 0; piece < PIECES; ++piece) {
                        const uint32_t both = halves_of(low, high);
                        weights[piece][n][e] = transposed(both);
                        low -= low_of(both);
                        high -= high_of(both);
                    }
                }
            }
            #pragma unroll
            for (int v = of * WIDE; v < (of + 1) * WIDE; v += BOTH) {
                uint32_t value[BOTH * 2];
                matrices<true>(value, there(here + PLANE, v));
                #pragma unroll
                for (int i = 0; i < BOTH * PRODUCTS; ++i) {
                    const uint32_t first = value[i / PRODUCTS * 2], second = value[i / PRODUCTS * 2 + 1];
                    const int code = i % PRODUCTS * 2;
                    const uint32_t a[4] = {centred_of<BITS>(first, code), centred_of<BITS>(first, code + 1),
                                           centred_of<BITS>(second, code), centred_of<BITS>(second, code + 1)};
                    #pragma unroll
                    for (int n = 0; n < SETS; ++n) {
                        #pragma unroll
                        for (int piece = 0; piece < PIECES; ++piece) {
                            multiply(sum[n][v * PRODUCTS + i], a, weights[piece][n][0], weights[piece][n][1]);
                        }
                    }
                }
            }
        }
    };
"""

_TILE: Final = """
    float top[SETS][2], total[SETS][2], offset[GROUPS][SETS][2], sum[SETS][D / 16][4];
    #pragma unroll
    for (int n = 0; n < SETS; ++n) {
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
            top[n][q] = NONE;
            total[n][q] = 0.0f;
            #pragma unroll
            for (int of = 0; of < GROUPS; ++of) offset[of][n][q] = 0.0f;
        }
        #pragma unroll
        for (int i = 0; i < D / 4; ++i) sum[n][i / 4][i % 4] = 0.0f;
    }
"""
"""What a warp has of the tiles that it has seen."""

_WEIGH: Final = """
    auto attend = [&](int tile, const unsigned char* here) {
        T numbers[4][2 * GROUPS];
        #pragma unroll
        for (int which = 0; which < 4; ++which) {
            uint32_t raw[sizeof(T) * GROUPS / 2];
            words(here + 2 * PLANE + which * NUMBERS + g * int(sizeof(raw)), raw);
            memcpy(numbers[which], raw, sizeof(raw));
        }
        float score[SETS][4], reach[2];
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            float largest = 1e-30f;
            #pragma unroll
            for (int of = 0; of < GROUPS; ++of) {
                largest = larger(largest, fabsf(float(numbers[2][e * GROUPS + of])));
            }
            reach[e] = logarithm(largest);
        }
        score_of(here, numbers, score);
        #pragma unroll
        for (int i = 0; i < SETS * 4; ++i) score[i / 4][i % 4] *= unit[i / 4][i % 2];
        if (tile * KEYS + KEYS > least + 1 || (WINDOW > 0 && tile * KEYS <= at - WINDOW)) {
            #pragma unroll
            for (int i = 0; i < SETS * 4; ++i) {
                const int p = tile * KEYS + g * 2 + i / 2 % 2, limit = least + (i / 4 * 8 + t * 2 + i % 2) / HEADS;
                if (p > limit || (WINDOW > 0 && p <= limit - WINDOW)) score[i / 4][i % 4] = NEVER;
            }
        }
        // What a query's weights are relative to may be less than the largest by a little: it seldom changes.
        float most[SETS][2];
        bool higher = false;
        #pragma unroll
        for (int i = 0; i < SETS * 2; ++i) {
            const int n = i / 2, q = i % 2;
            most[n][q] = larger(score[n][q] + reach[0], score[n][q + 2] + reach[1]);
            higher = higher || most[n][q] > top[n][q] + 8.0f;
        }
        if (__any_sync(0xffffffffu, higher)) {
            #pragma unroll
            for (int i = 0; i < SETS * 2; ++i) {
                const int n = i / 2, q = i % 2;
                const float best = larger(top[n][q], of_all_eight(larger, most[n][q]));
                const float kept = power_of_two(top[n][q] - best);
                top[n][q] = best;
                total[n][q] *= kept;
                #pragma unroll
                for (int of = 0; of < GROUPS; ++of) offset[of][n][q] *= kept;
                #pragma unroll
                for (int j = 0; j < D / 8; ++j) sum[n][j / 2][j % 2 * 2 + q] *= kept;
            }
        }
        #pragma unroll
        for (int i = 0; i < SETS * 4; ++i) {
            score[i / 4][i % 4] = power_of_two(score[i / 4][i % 4] - top[i / 4][i % 2]);
            total[i / 4][i % 2] += score[i / 4][i % 4];
        }
        sum_up(here, numbers, score);
    };
"""

ATTEND: Final = _TILE + _SCORES + _VALUES + _WEIGH
