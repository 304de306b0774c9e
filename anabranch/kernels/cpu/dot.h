// Products of a few rows of x with weight rows, straight from memory: bound by the speed of reading weights.
#pragma once

#include "elementwise.h"
#include "team.h"
#include "vec.h"

namespace ab {

// Weight rows read at once, far apart: four streams fill the memory pipeline of a core, one does not.
constexpr int STREAMS = 4;
// How far ahead of each stream the next lines are fetched; measured best from 2 to 4 KiB.
constexpr long FETCH_BYTES = 2048;
// Beyond so many rows tiles are faster; with AVX-512 they begin early.
#if defined(__AVX512F__)
constexpr int MAX_DOT_ROWS = 4;
#else
constexpr int MAX_DOT_ROWS = 8;
#endif

template <class E, int R, int T>
inline void dot_rows(const E* const* w, const E* x, long x_stride, long n, float out[T][R]) {
    f32 acc[R][T] = {};
    long k = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (sizeof(E) == 2) {
        for (; k < n; k += 32) {
            const __mmask32 mask = n - k >= 32 ? 0xffffffffu : (1u << (n - k)) - 1;
            __m512bh right[T];
            for (int t = 0; t < T; t++) right[t] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + t * x_stride + k);
            for (int r = 0; r < R; r++) {
                _mm_prefetch((const char*)(w[r] + k) + FETCH_BYTES, _MM_HINT_T0);
                const __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[r] + k);
                for (int t = 0; t < T; t++) acc[r][t] = (f32)_mm512_dpbf16_ps((__m512)acc[r][t], left, right[t]);
            }
        }
    }
#endif
    for (; k + LANES <= n; k += LANES) {
        f32 right[T];
        for (int t = 0; t < T; t++) right[t] = load(x + t * x_stride + k);
        for (int r = 0; r < R; r++) {
            __builtin_prefetch((const char*)(w[r] + k) + FETCH_BYTES);
            const f32 left = load(w[r] + k);
            for (int t = 0; t < T; t++) acc[r][t] = multiply_add(left, right[t], acc[r][t]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float total = sum(acc[r][t]);
            for (long i = k; i < n; i++) total += load1(w[r] + i) * load1(x + t * x_stride + i);
            out[t][r] = total;
        }
}

template <class E>
struct Linear {
    const E* x;
    long x_stride;
    const E* weight;  // [F, C], contiguous
    const E* bias;    // or null
    E* out;
    long out_stride;
    long num_rows, num_features, num_channels;
    bool gated;  // rows F/2.. are the gate's partners: out = silu(first half) * second half, [T, F / 2]

    float bias_of(long f) const { return bias ? load1(bias + f) : 0.0f; }
    long num_units() const { return gated ? num_features / 2 : num_features; }

    // Features f[0..N) of row t.
    template <int N>
    void put(long t, const long* f, const float* v) const {
        for (int i = 0; i < N; i++) store1(out + t * out_stride + f[i], v[i] + bias_of(f[i]));
    }

    // The same for N gates and the N partners after them, N at most STREAMS / 2.
    template <int N>
    void put_gated(long t, const long* f, const float* v) const {
        f32 gate{};
        for (int i = 0; i < N; i++) gate[i] = v[i] + bias_of(f[i]);
        gate = rounded(silu(rounded(gate, x)), x);
        for (int i = 0; i < N; i++) {
            const float up = rounded1(v[N + i] + bias_of(f[i] + num_features / 2), x);
            store1(out + t * out_stride + f[i], gate[i] * up);
        }
    }
};

// Weight rows w[0..R) times rows [t0, t0 + T) of x, and their places in the output: f[0..R), or the first
// half of them where a gate meets its partner.
template <class E, int R, int T>
inline void dot_block(const Linear<E>& op, const E* const* w, const long* f, long t0) {
    float out[T][R];
    dot_rows<E, R, T>(w, op.x + t0 * op.x_stride, op.x_stride, op.num_channels, out);
    for (int t = 0; t < T; t++) {
        if constexpr (R > 1)
            if (op.gated) {
                op.template put_gated<R / 2>(t0 + t, f, out[t]);
                continue;
            }
        op.template put<R>(t0 + t, f, out[t]);
    }
}

// All rows of x, four at a time, while the weight rows are in the first-level cache.
template <class E, int R>
inline void dot_group(const Linear<E>& op, const E* const* w, const long* f) {
    long t = 0;
    for (; t + 4 <= op.num_rows; t += 4) dot_block<E, R, 4>(op, w, f, t);
    if (op.num_rows - t == 3) dot_block<E, R, 3>(op, w, f, t);
    if (op.num_rows - t == 2) dot_block<E, R, 2>(op, w, f, t);
    if (op.num_rows - t == 1) dot_block<E, R, 1>(op, w, f, t);
}

// Output features [from, to) of all rows.
template <class E>
inline void dot_features(const Linear<E>& op, long from, long to) {
    const long half = op.num_features / 2, c = op.num_channels;
    const int streams = op.gated ? STREAMS / 2 : STREAMS;
    const long step = (to - from) / streams;
    const E* w[STREAMS];
    long f[STREAMS];
    for (long i = 0; i < step; i++) {
        for (int s = 0; s < STREAMS; s++) {
            const bool partner = s >= streams;
            f[s] = from + i + (partner ? s - streams : s) * step + (partner ? half : 0);
            w[s] = op.weight + f[s] * c;
        }
        dot_group<E, STREAMS>(op, w, f);
    }
    for (f[0] = from + step * streams; f[0] < to; f[0]++) {
        w[0] = op.weight + f[0] * c;
        w[1] = w[0] + half * c;
        if (op.gated)
            dot_group<E, 2>(op, w, f);
        else
            dot_group<E, 1>(op, w, f);
    }
}

template <class E>
void linear_dot(const Linear<E>& op, int threads) {
    const long units = op.num_units();
    parallel(threads, units * op.num_channels, [&](int rank, int size) {
        dot_features(op, units * rank / size, units * (rank + 1) / size);
    });
}

}  // namespace ab
