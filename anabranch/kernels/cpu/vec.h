// As many floats at a time as one register holds: GCC's vector extension, with intrinsics where they say more.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ab {

struct bf16 {
    uint16_t bits;
};

// Vectors wider than a register would live in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();

// Minus zero, which leaves every number as it is; a compiler may not leave out plus zero.
inline f32 splat(float x) { return x - f32{}; }

inline f32 load(const float* p) {
    f32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline f32 load(const bf16* p) {
    u16 v;
    memcpy(&v, p, sizeof v);
    return (f32)(__builtin_convertvector(v, u32) << 16);
}

inline float load1(const float* p) { return *p; }

inline float load1(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline void store(float* p, f32 v) { memcpy(p, &v, sizeof v); }

inline u32 round_bits(u32 bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }

// Rounds to nearest, ties to even.
inline void store(bf16* p, f32 v) {
#if defined(__AVX512BF16__)
    const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
#else
    const u16 out = __builtin_convertvector(round_bits((u32)v) >> 16, u16);
#endif
    memcpy(p, &out, sizeof out);
}

inline void store1(float* p, float x) { *p = x; }

inline void store1(bf16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// x as the element type would hold it.
inline f32 rounded(f32 v, const float*) { return v; }
inline f32 rounded(f32 v, const bf16*) {
    bf16 out[LANES];
    store(out, v);
    return load(out);
}
inline float rounded1(float x, const float*) { return x; }
inline float rounded1(float x, const bf16*) {
    bf16 b;
    store1(&b, x);
    return load1(&b);
}

// a * b + c with one rounding where the machine can: said, so that every copy of a loop computes the same bits.
inline f32 multiply_add(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
    return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum(f32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

inline f32 max(f32 a, f32 b) {
#if defined(__AVX512F__)
    return (f32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline float max1(f32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// e^x to about 2 units in the last place; exactly 0 for -inf, and no number where x is none.
inline f32 exp(f32 x) {
    const f32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    f32 clamped = max(x, splat(-87.0f));
    clamped = clamped > splat(88.0f) ? splat(88.0f) : clamped;
    f32 n = (clamped * 1.44269504088896341f + magic) - magic;
    f32 r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    f32 y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    i32 exponent = (__builtin_convertvector(n, i32) + 127) << 23;
    y = y * (f32)exponent;
    y = x < splat(-87.0f) ? f32{} : y;
    return x == x ? y : x;
}

// Towards the sums of as many vectors as one has lanes, as its lanes: four vectors to one whose lane 4 i + j is a part of
// the sum of v[j], then a quarter of LANES of those to the sums.
inline f32 sums4(const f32 v[4]) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return (f32)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
#elif defined(__AVX__)
    return (f32)_mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
#else
    f32 out;
    for (int j = 0; j < 4; j++) out[j] = sum(v[j]);
    return out;
#endif
}

inline f32 join_quads(const f32 quads[LANES / 4]) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)quads[0], b = (__m512)quads[1], c = (__m512)quads[2], d = (__m512)quads[3];
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
    return (f32)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#elif defined(__AVX__)
    const __m256 a = (__m256)quads[0], b = (__m256)quads[1];
    return (f32)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
    return quads[0];
#endif
}

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Grows and stays with its thread: scratch of one call, read by the team that the thread leads.
class Scratch {
public:
    ~Scratch() { free(data_); }
    void* get(size_t bytes) {
        if (bytes > size_) {
            free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = aligned_alloc(4096, size_);
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace ab
