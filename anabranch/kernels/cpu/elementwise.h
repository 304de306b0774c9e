// Norms, activations, rotary embedding and cache writes: one pass over memory each.
#pragma once

#include <algorithm>

#include "team.h"
#include "vec.h"

namespace ab {

// Rounds to the element type before the weight, as transformers does.
template <class E>
void rms_norm_row(const E* x, const E* weight, E* out, long n, float eps) {
    f32 squares{};
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32 v = load(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (; i < n; i++) total += load1(x + i) * load1(x + i);
    const float scale = 1.0f / std::sqrt(total / float(n) + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(out + i, load(weight + i) * rounded(load(x + i) * scale, x));
    for (; i < n; i++) store1(out + i, load1(weight + i) * rounded1(load1(x + i) * scale, x));
}

template <class E>
void rms_norm(const E* x, long stride_t, long stride_h, const E* weight, E* out, long num_t, long num_h, long n,
              float eps, int threads) {
    const long rows = num_t * num_h;
    parallel(threads, rows * n, [&](int rank, int size) {
        for (long r = rows * rank / size; r < rows * (rank + 1) / size; r++)
            rms_norm_row(x + r / num_h * stride_t + r % num_h * stride_h, weight, out + r * n, n, eps);
    });
}

// sum = a + b (rounded to the element type), out = rms_norm(sum).
template <class E>
void add_rms_norm(const E* a, const E* b, const E* weight, E* total, E* out, long rows, long n, float eps,
                  int threads) {
    parallel(threads, rows * n * 2, [&](int rank, int size) {
        for (long r = rows * rank / size; r < rows * (rank + 1) / size; r++) {
            const E *pa = a + r * n, *pb = b + r * n;
            E* pt = total + r * n;
            long i = 0;
            for (; i + LANES <= n; i += LANES) store(pt + i, load(pa + i) + load(pb + i));
            for (; i < n; i++) store1(pt + i, load1(pa + i) + load1(pb + i));
            rms_norm_row(pt, weight, out + r * n, n, eps);
        }
    });
}

inline f32 silu(f32 x) { return x / (exp(-x) + 1.0f); }

template <class E>
void silu_mul_row(const E* gate, const E* up, E* out, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, rounded(silu(load(gate + i)), gate) * load(up + i));
    for (; i < n; i++) {
        const float g = load1(gate + i);
        store1(out + i, rounded1(g / (1.0f + std::exp(-g)), gate) * load1(up + i));
    }
}

template <class E>
void silu_mul(const E* gate_up, long stride, E* out, long rows, long n, int threads) {
    parallel(threads, rows * n * 4, [&](int rank, int size) {
        for (long r = rows * rank / size; r < rows * (rank + 1) / size; r++)
            silu_mul_row(gate_up + r * stride, gate_up + r * stride + n, out + r * n, n);
    });
}

// The first `turned` features of a head; the others are copied.
template <class E>
void rotary_row(const E* x, const float* cos, const float* sin, E* out, long d, long turned) {
    const long half = turned / 2;
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        f32 a = load(x + i), b = load(x + half + i);
        store(out + i, a * load(cos + i) - b * load(sin + i));
        store(out + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (; i < half; i++) {
        const float a = load1(x + i), b = load1(x + half + i);
        store1(out + i, a * cos[i] - b * sin[i]);
        store1(out + half + i, b * cos[half + i] + a * sin[half + i]);
    }
    std::copy(x + turned, x + d, out + turned);
}

template <class E>
void rotary(const E* x, long stride_t, long stride_h, const float* cos, const float* sin, E* out, long num_t,
            long num_h, long d, long turned, int threads) {
    parallel(threads, num_t * num_h * d * 2, [&](int rank, int size) {
        for (long t = num_t * rank / size; t < num_t * (rank + 1) / size; t++)
            for (long h = 0; h < num_h; h++)
                rotary_row(x + t * stride_t + h * stride_h, cos + t * turned, sin + t * turned,
                           out + (t * num_h + h) * d, d, turned);
    });
}

// Place of the first of the largest; NaN is larger than all.
template <class E>
long argmax_row(const E* x, long n) {
    constexpr int WAYS = 4;  // running maxima, so that one does not wait for the other
    f32 top[WAYS];
    for (f32& t : top) t = splat(-INF);
    i32 unordered{};
    long i = 0;
    for (; i + WAYS * LANES <= n; i += WAYS * LANES)
        for (int j = 0; j < WAYS; j++) {
            const f32 v = load(x + i + j * LANES);
            unordered |= v != v;
            top[j] = max(top[j], v);
        }
    float best = max1(max(max(top[0], top[1]), max(top[2], top[3])));
    bool any_nan = false;
    for (int lane = 0; lane < LANES; lane++) any_nan |= unordered[lane] != 0;
    for (; i < n; i++) {
        const float v = load1(x + i);
        any_nan |= v != v;
        best = v > best ? v : best;
    }
    i = 0;
    for (; i + LANES <= n; i += LANES) {
        const f32 v = load(x + i);
        const i32 found = any_nan ? v != v : v == splat(best);
        for (int lane = 0; lane < LANES; lane++)
            if (found[lane]) return i + lane;
    }
    for (; i < n; i++) {
        const float v = load1(x + i);
        if (any_nan ? v != v : v == best) return i;
    }
    return 0;
}

template <class E>
void argmax(const E* x, long stride, int64_t* out, long rows, long n, int threads) {
    parallel(threads, rows * n, [&](int rank, int size) {
        for (long r = rows * rank / size; r < rows * (rank + 1) / size; r++) out[r] = argmax_row(x + r * stride, n);
    });
}

// Copies [T, K, D] rows of K and V to their slots; a pool may have more heads than these.
inline void store_kv(const char* k, const char* v, long k_stride_t, long k_stride_h, long v_stride_t, long v_stride_h,
                     char* k_pool, char* v_pool, const int64_t* slots, long num_t, long num_h, long row_bytes,
                     int threads) {
    parallel(threads, num_t * num_h * row_bytes, [&](int rank, int size) {
        for (long t = num_t * rank / size; t < num_t * (rank + 1) / size; t++)
            for (long h = 0; h < num_h; h++) {
                const long to = (slots[t] * num_h + h) * row_bytes;
                memcpy(k_pool + to, k + t * k_stride_t + h * k_stride_h, row_bytes);
                memcpy(v_pool + to, v + t * v_stride_t + h * v_stride_h, row_bytes);
            }
    });
}

// Some rows of K, then the same rows of V, one after the other: those listed, or a span where there is no list.
inline void export_kv(const char* k, const char* v, char* out, const int64_t* rows, long first_row, long num_rows,
                      long k_stride_t, long v_stride_t, long row_bytes, int threads) {
    parallel(threads, 2 * num_rows * row_bytes, [&](int rank, int size) {
        const long begin = num_rows * rank / size, end = num_rows * (rank + 1) / size;
        for (int plane = 0; plane < 2; plane++) {
            const char* from = plane ? v : k;
            const long stride = plane ? v_stride_t : k_stride_t;
            char* to = out + (plane * num_rows + begin) * row_bytes;
            for (long r = begin; r < end;) {
                const long row = rows ? rows[r] : first_row + r;
                long count = 1;
                if (stride == row_bytes)
                    while (r + count < end && (!rows || rows[r + count] == row + count)) count++;
                memcpy(to, from + row * stride, count * row_bytes);
                to += count * row_bytes;
                r += count;
            }
        }
    });
}

// K and V of some layers, `num_planes` times `num_t` rows, to the same slots of as many planes of a pool. Past the
// caches where rows are aligned: a line that nobody reads soon is not fetched to be overwritten, and drives none out.
// On one thread, which memory is busy with already: it runs beside the steps of other requests.
inline void import_kv(const char* kv, char* pool, const int64_t* slots, long num_planes, long plane_bytes,
                      long slot_bytes, long num_t, long row_bytes) {
#if defined(__x86_64__)
    const bool past_caches = ((uintptr_t)pool | plane_bytes | slot_bytes | row_bytes) % sizeof(__m128i) == 0;
#endif
    for (long plane = 0; plane < num_planes; plane++, pool += plane_bytes)
        for (long t = 0; t < num_t; t++, kv += row_bytes) {
            char* to = pool + slots[t] * slot_bytes;
#if defined(__x86_64__)
            if (past_caches) {
                for (long i = 0; i < row_bytes; i += sizeof(__m128i))
                    _mm_stream_si128((__m128i*)(to + i), _mm_loadu_si128((const __m128i*)(kv + i)));
                continue;
            }
#endif
            memcpy(to, kv, row_bytes);
        }
#if defined(__x86_64__)
    if (past_caches) _mm_sfence();
#endif
}

}  // namespace ab
