// One token's query heads against a span of keys and values, read in place.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace ab {

constexpr int SPAN = 64;  // tokens whose scores are held at once; a multiple of 16

// Scores of G query heads with as many keys as a vector has lanes: to[g * SPAN + i] = q[g] . keys[i].
template <class E, int G>
inline void dot_keys(const E* const* keys, const E* q, long q_stride, long d, float* to) {
    f32 quads[G][LANES / 4];
    for (int block = 0; block < LANES / 4; block++) {
        f32 acc[G][4] = {};
        long i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
        if constexpr (sizeof(E) == 2) {
            for (; i < d; i += 32) {
                const __mmask32 mask = d - i >= 32 ? 0xffffffffu : 0xffffu;
                __m512bh key[4];
                for (int j = 0; j < 4; j++) key[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys[4 * block + j] + i);
                for (int g = 0; g < G; g++) {
                    const __m512bh query = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + g * q_stride + i);
                    for (int j = 0; j < 4; j++)
                        acc[g][j] = (f32)_mm512_dpbf16_ps((__m512)acc[g][j], key[j], query);
                }
            }
        }
#endif
        for (; i < d; i += LANES) {
            f32 key[4];
            for (int j = 0; j < 4; j++) key[j] = load(keys[4 * block + j] + i);
            for (int g = 0; g < G; g++) {
                const f32 query = load(q + g * q_stride + i);
                for (int j = 0; j < 4; j++) acc[g][j] = multiply_add(key[j], query, acc[g][j]);
            }
        }
        for (int g = 0; g < G; g++) quads[g][block] = sums4(acc[g]);
    }
    for (int g = 0; g < G; g++) store(to + g * SPAN, join_quads(quads[g]));
}

// Vectors of values that are added up at once: with four heads, half of the registers or more.
constexpr int VALUES = LANES == 16 ? 4 : 2;

// o[g][0..LANES V) += sum of p[g][i] * values[i][at..], for G heads.
template <class E, int G, int V>
inline void add_values(float* o, long d, const float* p, const E* const* values, long at, int count) {
    f32 acc[G][V];
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) acc[g][j] = load(o + g * d + j * LANES);
    for (int i = 0; i < count; i++) {
        f32 value[V];
        for (int j = 0; j < V; j++) value[j] = load(values[i] + at + j * LANES);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < V; j++) acc[g][j] = multiply_add(value[j], splat(p[g * SPAN + i]), acc[g][j]);
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) store(o + g * d + j * LANES, acc[g][j]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same for 32 V elements, two tokens in one instruction, p rounded to bf16.
template <int G, int V>
inline void add_value_pairs(float* o, long d, const float* p, const bf16* const* values, long at, int count) {
    // Interleaving two rows leaves fours of elements in turn: {0-3, 8-11, ..} and {4-7, 12-15, ..}.
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    bf16 weights[G][SPAN];
    for (int g = 0; g < G; g++)
        for (int i = 0; i < SPAN; i += LANES) store(weights[g] + i, load(p + g * SPAN + i));
    __m512 acc[G][V][2];
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) {
            const __m512 low = _mm512_loadu_ps(o + g * d + j * 32), high = _mm512_loadu_ps(o + g * d + j * 32 + 16);
            acc[g][j][0] = _mm512_permutex2var_ps(low, even, high);
            acc[g][j][1] = _mm512_permutex2var_ps(low, odd, high);
        }
    for (int i = 0; i < count; i += 2) {
        __m512bh value[V][2];
        for (int j = 0; j < V; j++) {
            const __m512i a = _mm512_loadu_si512(values[i] + at + j * 32);
            const __m512i b = _mm512_loadu_si512(values[i + 1] + at + j * 32);
            value[j][0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            value[j][1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
        }
        for (int g = 0; g < G; g++) {
            int32_t pair;
            memcpy(&pair, weights[g] + i, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < V; j++)
                for (int n = 0; n < 2; n++) acc[g][j][n] = _mm512_dpbf16_ps(acc[g][j][n], weight, value[j][n]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) {
            _mm512_storeu_ps(o + g * d + j * 32, _mm512_permutex2var_ps(acc[g][j][0], first, acc[g][j][1]));
            _mm512_storeu_ps(o + g * d + j * 32 + 16, _mm512_permutex2var_ps(acc[g][j][0], second, acc[g][j][1]));
        }
}
#endif

// One pass of online softmax for G heads over `count` tokens, whose scores are in p[g * SPAN + i]; the arrays have
// SPAN pointers, those past `count` valid.
template <class E, int G>
inline void attend_heads(float* p, const E* const* values, int count, long d, float scale, float* o, float* m,
                         float* l) {
    const int blocks = (count + LANES - 1) / LANES;
    for (int g = 0; g < G; g++) {
        float* row = p + g * SPAN;
        for (int i = count; i < blocks * LANES; i++) row[i] = -INF;
        f32 top = load(row);
        for (int b = 1; b < blocks; b++) top = max(top, load(row + b * LANES));
        const float now = std::max(m[g], max1(top) * scale);
        const float fade = std::exp(m[g] - now);
        f32 total{};
        for (int b = 0; b < blocks; b++) {
            const f32 weight = exp(load(row + b * LANES) * scale - now);
            store(row + b * LANES, weight);
            total += weight;
        }
        l[g] = l[g] * fade + sum(total);
        m[g] = now;
        if (fade != 1.0f)
            for (long i = 0; i < d; i += LANES) store(o + g * d + i, load(o + g * d + i) * fade);
    }
    long i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (sizeof(E) == 2) {
        for (; i + 64 <= d; i += 64) add_value_pairs<G, 2>(o + i, d, p, values, i, count);
        for (; i + 32 <= d; i += 32) add_value_pairs<G, 1>(o + i, d, p, values, i, count);
    }
#endif
    for (; i + VALUES * LANES <= d; i += VALUES * LANES) add_values<E, G, VALUES>(o + i, d, p, values, i, count);
    for (; i < d; i += LANES) add_values<E, G, 1>(o + i, d, p, values, i, count);
}

// One KV head's query heads at a span of keys and values. `Scores` fills p: scores.get<G>(first head, p).
template <class E, class Scores>
inline void attend_group(const Scores& scores, const E* const* values, int count, long d, float scale, long heads,
                         float* o, float* m, float* l) {
    const auto some = [&](auto size, long from) {
        constexpr int G = decltype(size)::value;
        float p[G * SPAN];
        scores.template get<G>(from, p);
        attend_heads<E, G>(p, values, count, d, scale, o + from * d, m + from, l + from);
    };
    long from = 0;
    for (; heads - from >= 4; from += 4) some(std::integral_constant<int, 4>(), from);
    if (heads - from == 3) some(std::integral_constant<int, 3>(), from);
    if (heads - from == 2) some(std::integral_constant<int, 2>(), from);
    if (heads - from == 1) some(std::integral_constant<int, 1>(), from);
}

}  // namespace ab
