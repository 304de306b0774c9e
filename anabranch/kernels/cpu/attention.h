// What both attention kernels are given, and attention of single tokens over the paged cache.
//
// One KV head's rows are read once for the whole group of query heads that shares it. Work is shared by
// (row, KV head) and, where that makes too few pieces, by spans of the context, merged by log-sum-exp.
#pragma once

#include <algorithm>
#include <vector>

#include "team.h"
#include "vec.h"

namespace ab {

template <class E>
struct Attention {
    const E* q;  // [T, H, D]
    long q_stride_t, q_stride_h;
    const E *k, *v;         // pools, [slots, K, D]
    const int32_t* tables;  // [B, table_width]
    long table_width;
    const int32_t* starts;  // [B + 1] rows of T
    const int32_t* lens;    // [B] tokens in the cache, the new ones among them
    long num_sequences, num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    long window;     // 0: none
    long max_short;  // sequences with more new tokens are for the prefill kernel
    E* out;          // [T, H, D]
    float* lse;      // [T, H]

    long group() const { return num_heads / num_kv_heads; }
    long num_new(long b) const { return starts[b + 1] - starts[b]; }
    // Offset in the pools of a token's row of one KV head.
    long offset(long b, long token, long kv_head) const {
        const long slot = tables[b * table_width + token / block_size] * block_size + token % block_size;
        return (slot * num_kv_heads + kv_head) * head_dim;
    }
};

constexpr int SPAN = 64;             // tokens whose scores are held at once
constexpr long MIN_SPLIT = 256;      // tokens that are worth a piece of work of their own
constexpr long PIECES_PER_THREAD = 4;

// A query token: its row, its sequence, and the tokens [from, to) that it sees.
struct DecodeRow {
    long row, sequence, from, to;
};

// Scores of one query head with 16 keys.
template <class E>
inline f32 dot16(const E* const* keys, const E* q, long d) {
    f32 acc[LANES] = {};
    long i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (sizeof(E) == 2) {
        for (; i < d; i += 32) {
            const __mmask32 mask = d - i >= 32 ? 0xffffffffu : 0xffffu;
            const __m512bh right = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + i);
            for (int j = 0; j < LANES; j++)
                acc[j] = (f32)_mm512_dpbf16_ps((__m512)acc[j], (__m512bh)_mm512_maskz_loadu_epi16(mask, keys[j] + i), right);
        }
        return sums(acc);
    }
#endif
    for (; i < d; i += LANES) {
        const f32 right = load(q + i);
        for (int j = 0; j < LANES; j++) acc[j] += load(keys[j] + i) * right;
    }
    return sums(acc);
}

// o[G][D] += p[G][count] * values[count][D], at d0, for G heads and V vectors of sixteen.
template <class E, int G, int V>
inline void add_values(float* o, long d, const float* p, const E* const* values, int count) {
    f32 acc[G][V];
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) acc[g][j] = load(o + g * d + j * LANES);
    for (int i = 0; i < count; i++) {
        f32 value[V];
        for (int j = 0; j < V; j++) value[j] = load(values[i] + j * LANES);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < V; j++) acc[g][j] += value[j] * p[g * SPAN + i];
    }
    for (int g = 0; g < G; g++)
        for (int j = 0; j < V; j++) store(o + g * d + j * LANES, acc[g][j]);
}

template <class E, int V>
inline void add_values_of_heads(float* o, long d, const float* p, const E* const* values, int count, long heads) {
    for (; heads >= 4; heads -= 4, o += 4 * d, p += 4 * SPAN) add_values<E, 4, V>(o, d, p, values, count);
    if (heads == 3) add_values<E, 3, V>(o, d, p, values, count);
    if (heads == 2) add_values<E, 2, V>(o, d, p, values, count);
    if (heads == 1) add_values<E, 1, V>(o, d, p, values, count);
}

// Partial attention of one token's group of heads over [from, to): o[G][D] unnormalised, m[G], l[G].
template <class E>
void attend_span(const Attention<E>& op, const DecodeRow& row, long kv_head, long from, long to, float* o, float* m,
                 float* l, float* p) {
    const long d = op.head_dim, group = op.group();
    const E* q = op.q + row.row * op.q_stride_t + kv_head * group * op.q_stride_h;
    std::fill(o, o + group * d, 0.0f);
    std::fill(m, m + group, -INF);
    std::fill(l, l + group, 0.0f);
    const E *keys[SPAN], *values[SPAN];
    for (long at = from; at < to; at += SPAN) {
        const int count = int(std::min<long>(SPAN, to - at));
        for (int i = 0; i < SPAN; i++) {
            const long offset = op.offset(row.sequence, at + std::min(i, count - 1), kv_head);
            keys[i] = op.k + offset;
            values[i] = op.v + offset;
        }
        for (int i = 0; i < count; i++)
            for (long line = 0; line < d; line += 64 / long(sizeof(E))) __builtin_prefetch(values[i] + line);
        const int blocks = int(ceil_div(count, LANES));
        for (long g = 0; g < group; g++) {
            f32 top = splat(-INF);
            for (int b = 0; b < blocks; b++) {
                f32 score = dot16(keys + b * LANES, q + g * op.q_stride_h, d) * op.scale;
                for (int i = count - b * LANES; i < LANES; i++) score[i] = -INF;
                store(p + g * SPAN + b * LANES, score);
                top = max(top, score);
            }
            const float now = std::max(m[g], max1(top));
            const float fade = std::exp(m[g] - now);
            f32 total{};
            for (int b = 0; b < blocks; b++) {
                const f32 weight = exp(load(p + g * SPAN + b * LANES) - now);
                store(p + g * SPAN + b * LANES, weight);
                total += weight;
            }
            l[g] = l[g] * fade + sum(total);
            m[g] = now;
            if (fade != 1.0f)
                for (long i = 0; i < d; i += LANES) store(o + g * d + i, load(o + g * d + i) * fade);
        }
        long i = 0;
        for (; i + 64 <= d; i += 64) {
            for (int j = 0; j < count; j++) values[j] += i ? 64 : 0;
            add_values_of_heads<E, 4>(o + i, d, p, values, count, group);
        }
        for (; i < d; i += LANES) {
            for (int j = 0; j < count; j++) values[j] += i ? (i % 64 ? LANES : 64) : 0;
            add_values_of_heads<E, 1>(o + i, d, p, values, count, group);
        }
    }
}

// Merges `splits` partial results, `stride` floats apart, and writes out and LSE of a group of heads.
template <class E>
void finish_heads(const Attention<E>& op, const DecodeRow& row, long kv_head, float* part, long splits, long stride) {
    const long d = op.head_dim, group = op.group();
    for (long g = 0; g < group; g++) {
        const long head = row.row * op.num_heads + kv_head * group + g;
        const float* m = part + group * d + g;
        float* l = part + group * (d + 1) + g;
        float top = -INF, total = 0;
        for (long s = 0; s < splits; s++) top = std::max(top, m[s * stride]);
        for (long s = 0; s < splits; s++) total += l[s * stride] * std::exp(m[s * stride] - top);
        for (long s = 0; s < splits; s++) l[s * stride] = std::exp(m[s * stride] - top) / total;
        op.lse[head] = top + std::log(total);
        for (long i = 0; i < d; i += LANES) {
            f32 value{};
            for (long s = 0; s < splits; s++) value += load(part + s * stride + g * d + i) * l[s * stride];
            store(op.out + head * d + i, value);
        }
    }
}

template <class E>
void attention_short(const Attention<E>& op, int threads) {
    static thread_local std::vector<DecodeRow> rows;
    static thread_local Scratch scratch;
    rows.clear();
    long work = 0, longest = 0;
    for (long b = 0; b < op.num_sequences; b++) {
        const long num_new = op.num_new(b);
        if (num_new > op.max_short) continue;
        for (long i = 0; i < num_new; i++) {
            const long to = op.lens[b] - num_new + i + 1;
            const long from = op.window ? std::max(0L, to - op.window) : 0;
            rows.push_back({op.starts[b] + i, b, from, to});
            work += to - from;
            longest = std::max(longest, to - from);
        }
    }
    const long heads = op.num_kv_heads, d = op.head_dim, group = op.group();
    const long pieces = long(rows.size()) * heads;
    if (pieces == 0) return;
    const long wanted = threads > 1 ? ceil_div(PIECES_PER_THREAD * threads, pieces) : 1;
    const long splits = std::max(1L, std::min(wanted, longest / MIN_SPLIT));
    const long stride = group * (d + 2);  // o[G][D], m[G], l[G]
    float* parts = (float*)scratch.get((pieces * splits * stride + threads * group * SPAN) * sizeof(float));
    float* weights = parts + pieces * splits * stride;
    const DecodeRow* first = rows.data();
    long next = 0, next_merge = 0;
    parallel(threads, work * heads * d * 2, [&](int rank, int size) {
        float* p = weights + rank * group * SPAN;
        for (;;) {
            const long item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (item >= pieces * splits) break;
            const DecodeRow& row = first[item / splits / heads];
            const long kv_head = item / splits % heads, s = item % splits, length = row.to - row.from;
            float* o = parts + item * stride;
            attend_span(op, row, kv_head, row.from + length * s / splits, row.from + length * (s + 1) / splits, o,
                        o + group * d, o + group * (d + 1), p);
            if (splits == 1) finish_heads(op, row, kv_head, o, 1, stride);
        }
        if (splits == 1) return;
        if (size > 1) {
#pragma omp barrier
        }
        for (;;) {
            const long piece = __atomic_fetch_add(&next_merge, 1, __ATOMIC_RELAXED);
            if (piece >= pieces) break;
            finish_heads(op, first[piece / heads], piece % heads, parts + piece * splits * stride, splits, stride);
        }
    });
}

}  // namespace ab
