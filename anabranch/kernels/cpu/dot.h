// Products of a few rows of x with weight rows, straight from memory: bound by the speed of reading weights.
#pragma once

#include "team.h"
#include "vec.h"

namespace ab {

// Weight rows read at once, far apart: four streams fill the memory pipeline of a core, one does not.
constexpr int STREAMS = 4;
// How far ahead of each stream the next lines are fetched; measured best from 2 to 4 KiB.
constexpr long FETCH_BYTES = 2048;
constexpr int MAX_DOT_ROWS = 4;

template <class E, int R, int T>
inline void dot_rows(const E* const* w, const E* x, long x_stride, long n, float out[R][T]) {
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
            for (int t = 0; t < T; t++) acc[r][t] += left * right[t];
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float total = sum(acc[r][t]);
            for (long i = k; i < n; i++) total += load1(w[r] + i) * load1(x + t * x_stride + i);
            out[r][t] = total;
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
    void put(long t, long f, float v) const { store1(out + t * out_stride + f, v + bias_of(f)); }
    void put_gated(long t, long f, float gate, float up) const {
        gate = rounded1(gate + bias_of(f), x);
        up = rounded1(up + bias_of(f + num_features / 2), x);
        gate = rounded1(gate / (1.0f + std::exp(-gate)), x);
        store1(out + t * out_stride + f, gate * up);
    }
};

// Output features [from, to) of T rows starting at row t0.
template <class E, int T>
inline void dot_features(const Linear<E>& op, long t0, long from, long to) {
    const long half = op.num_features / 2, c = op.num_channels;
    const E* x = op.x + t0 * op.x_stride;
    const int streams = op.gated ? STREAMS / 2 : STREAMS;
    const long step = (to - from) / streams;
    float out[STREAMS][T];
    const E* w[STREAMS];
    for (long i = 0; i < step; i++) {
        const long f = from + i;
        if (op.gated) {
            for (int s = 0; s < 2; s++) {
                w[s] = op.weight + (f + s * step) * c;
                w[s + 2] = op.weight + (f + s * step + half) * c;
            }
            dot_rows<E, STREAMS, T>(w, x, op.x_stride, c, out);
            for (int s = 0; s < 2; s++)
                for (int t = 0; t < T; t++) op.put_gated(t0 + t, f + s * step, out[s][t], out[s + 2][t]);
        } else {
            for (int s = 0; s < STREAMS; s++) w[s] = op.weight + (f + s * step) * c;
            dot_rows<E, STREAMS, T>(w, x, op.x_stride, c, out);
            for (int s = 0; s < STREAMS; s++)
                for (int t = 0; t < T; t++) op.put(t0 + t, f + s * step, out[s][t]);
        }
    }
    for (long f = from + step * streams; f < to; f++) {
        w[0] = op.weight + f * c;
        if (op.gated) {
            w[1] = op.weight + (f + half) * c;
            dot_rows<E, 2, T>(w, x, op.x_stride, c, out);
            for (int t = 0; t < T; t++) op.put_gated(t0 + t, f, out[0][t], out[1][t]);
        } else {
            dot_rows<E, 1, T>(w, x, op.x_stride, c, out);
            for (int t = 0; t < T; t++) op.put(t0 + t, f, out[0][t]);
        }
    }
}

// Any number of rows, four at a time.
template <class E>
inline void dot_all_rows(const Linear<E>& op, long from, long to) {
    long t = 0;
    for (; t + 4 <= op.num_rows; t += 4) dot_features<E, 4>(op, t, from, to);
    if (op.num_rows - t == 3) dot_features<E, 3>(op, t, from, to);
    if (op.num_rows - t == 2) dot_features<E, 2>(op, t, from, to);
    if (op.num_rows - t == 1) dot_features<E, 1>(op, t, from, to);
}

template <class E>
void linear_dot(const Linear<E>& op, int threads) {
    const long units = op.num_units();
    parallel(threads, units * op.num_channels, [&](int rank, int size) {
        dot_all_rows(op, units * rank / size, units * (rank + 1) / size);
    });
}

}  // namespace ab
