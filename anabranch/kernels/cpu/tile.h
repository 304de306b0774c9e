// Small bf16 matrix products, C[16 M][16 N] (+)= A * B, that everything compute-bound is built on.
//
// A is row-major as it lies in memory (weight rows, key rows). B is packed into panels of 16 columns,
// pairs of k together: [K / 2][16][2], which is what both AMX tiles and vdpbf16ps read. K is a multiple of 32.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define AB_TILES 1

#if defined(__AMX_BF16__) && defined(__linux__)
#define AB_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ab {

constexpr int TILE = 16;                  // rows of A, columns of B
constexpr int TILE_K = 32;                // bf16 elements of k in one step
constexpr int PANEL_STEP = TILE * TILE_K;  // elements of a panel in one step

// Whether the kernel lets this process use AMX; asked once.
inline bool amx_allowed() {
#if defined(AB_AMX)
    static const bool allowed = [] {
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    }();
    return allowed;
#else
    return false;
#endif
}

// A thread holds one while it multiplies; AMX needs its tiles configured and, after, released.
class TileSession {
public:
    TileSession() {
#if defined(AB_AMX)
        if (!amx_allowed()) return;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
#endif
    }
    ~TileSession() {
#if defined(AB_AMX)
        if (amx_allowed()) _tile_release();
#endif
    }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// One k step of a panel: up to 16 rows (B's columns), 32 elements each; the missing ones are zero.
inline void pack_step(const bf16* rows, long stride, int count, bf16* panel) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + i * 32, r[i]);
}

// What a product of weights from memory fetches meanwhile, for another, into the second-level cache: of as many
// elements as a row tile has, `elements` beyond its start, in the order of memory, the lines [from, to) of each 16.
struct Ahead {
    long elements = 0, from = 0, to = 0;

    void fetch(const bf16* tile, long step) const {
        const bf16* next = tile + elements + step * PANEL_STEP;
        for (long i = from; i < to; i++) _mm_prefetch((const char*)(next + i * 32), _MM_HINT_T1);
    }
};

#if defined(AB_AMX)
template <int MT, int NT>
inline void tile_gemm_amx(const bf16* const* a, long lda, const bf16* const* b, long steps, float* c, long ldc,
                          bool accumulate, const Ahead& ahead) {
    const long row = lda * 2, c_row = ldc * 4;
    if (accumulate) {
        _tile_loadd(0, c, c_row);
        if constexpr (NT == 2) _tile_loadd(1, c + 16, c_row);
        if constexpr (MT == 2) _tile_loadd(2, c + 16 * ldc, c_row);
        if constexpr (MT == 2 && NT == 2) _tile_loadd(3, c + 16 * ldc + 16, c_row);
    } else {
        _tile_zero(0);
        if constexpr (NT == 2) _tile_zero(1);
        if constexpr (MT == 2) _tile_zero(2);
        if constexpr (MT == 2 && NT == 2) _tile_zero(3);
    }
    for (long k = 0; k < steps; k++) {
        const bf16 *a0 = a[0] + k * TILE_K, *b0 = b[0] + k * PANEL_STEP;
        const bf16* a1 = MT == 2 ? a[1] + k * TILE_K : nullptr;
        if (ahead.to) {
            ahead.fetch(a[0], k);
            if constexpr (MT == 2) ahead.fetch(a[1], k);
        }
        _tile_loadd(4, a0, row);
        _tile_loadd(6, b0, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (MT == 2) {
            _tile_loadd(5, a1, row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (NT == 2) {
            _tile_loadd(7, b[1] + k * PANEL_STEP, 64);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (MT == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_row);
    if constexpr (NT == 2) _tile_stored(1, c + 16, c_row);
    if constexpr (MT == 2) _tile_stored(2, c + 16 * ldc, c_row);
    if constexpr (MT == 2 && NT == 2) _tile_stored(3, c + 16 * ldc + 16, c_row);
}
#endif

template <int MT, int NT>
inline void tile_gemm_avx512(const bf16* const* a, long lda, const bf16* const* b, long steps, float* c, long ldc,
                             bool accumulate, const Ahead& ahead) {
    constexpr int ROWS = 8;
    for (int block = 0; block < MT * 16 / ROWS; block++) {
        const bf16* rows = a[block * ROWS / 16] + (block * ROWS % 16) * lda;
        float* to = c + block * ROWS * ldc;
        __m512 acc[ROWS][NT];
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < NT; n++)
                acc[i][n] = accumulate ? _mm512_loadu_ps(to + i * ldc + n * 16) : _mm512_setzero_ps();
        for (long p = 0; p < steps * TILE_K / 2; p++) {
            if (ahead.to && p % 16 == 0 && block % 2 == 0) ahead.fetch(a[block / 2], p / 16);
            __m512bh columns[NT];
            for (int n = 0; n < NT; n++) columns[n] = (__m512bh)_mm512_loadu_si512(b[n] + p * 32);
            for (int i = 0; i < ROWS; i++) {
                int32_t pair;
                memcpy(&pair, rows + i * lda + 2 * p, 4);
                const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
                for (int n = 0; n < NT; n++) acc[i][n] = _mm512_dpbf16_ps(acc[i][n], left, columns[n]);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < NT; n++) _mm512_storeu_ps(to + i * ldc + n * 16, acc[i][n]);
    }
}

// MT row tiles (each at its own address, rows `lda` elements apart) by NT panels, `steps` of 32 k.
template <int MT, int NT>
inline void tile_gemm(const bf16* const* a, long lda, const bf16* const* b, long steps, float* c, long ldc,
                      bool accumulate, const Ahead& ahead = {}) {
#if defined(AB_AMX)
    if (amx_allowed()) return tile_gemm_amx<MT, NT>(a, lda, b, steps, c, ldc, accumulate, ahead);
#endif
    tile_gemm_avx512<MT, NT>(a, lda, b, steps, c, ldc, accumulate, ahead);
}

}  // namespace ab
#endif
