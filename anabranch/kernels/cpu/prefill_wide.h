// Attention of many new tokens in float32 arithmetic, whatever the elements are; see prefill.h.
//
// Keys and values are widened as they are copied; both products are the tile of wide.h, and a block's weights are the
// right operand of the second one where the first has left its scores.
#pragma once

#include "prefill.h"
#include "wide.h"

namespace ab {

template <class E>
class PrefillWide {
public:
    typedef E Element;
    typedef float Gathered;
    static constexpr long QUERIES = 2 * WIDE_TOKENS;
    static constexpr long SPARE_ROWS = WIDE_FEATURES;

    explicit PrefillWide(const Attention<E>& op) : op(op), d(op.head_dim) {
        static thread_local Scratch own;
        // A last tile of features writes beyond the D that there are.
        output_floats = ceil_div(d, WIDE_FEATURES) * WIDE_FEATURES * WIDE_TOKENS;
        queries = (float*)own.get(PANELS * ((KEYS + d) * WIDE_TOKENS + output_floats) * sizeof(float));
        output = queries + PANELS * d * WIDE_TOKENS;
        scores = output + PANELS * output_floats;
    }

    // Copies keys [at, at + GATHERED) of one KV head out of the pool; those beyond the context are zero.
    void gather(const PrefillSequence<float>& s, long kv_head, long at) {
        float* k = s.k + (kv_head * s.padded + at) * d;
        float* v = s.v + kv_head * d * s.padded + at;
        const long count = std::max(0L, std::min<long>(GATHERED, s.context - s.base - at));
        op.each_token(s.sequence, s.base + at, count, [&](long i, long offset) {
            widen(op.k + offset + kv_head * d, d, k + i * d);
            const E* value = op.v + offset + kv_head * d;
            for (long j = 0; j < d; j++) v[j * s.padded + i] = load1(value + j);
        });
        memset(k + count * d, 0, (GATHERED - count) * d * sizeof(float));
        for (long j = 0; j < d; j++) memset(v + j * s.padded + count, 0, (GATHERED - count) * sizeof(float));
    }

    void begin() {}

    void attend(const PrefillSequence<float>& s, const PrefillItem& item) {
        const long row = op.starts[s.sequence] + item.query, count = std::min(QUERIES, s.num_new - item.query);
        const long first = op.whole ? s.context - 1 : s.context - s.num_new + item.query;
        const long last = op.whole ? first : first + count - 1;
        const long kv_head = item.head / op.group(), panels = ceil_div(count, WIDE_TOKENS);
        for (long p = 0; p < panels; p++) pack(row + p * WIDE_TOKENS, item.head, count - p * WIDE_TOKENS, p);
        memset(output, 0, panels * output_floats * sizeof(float));
        for (long p = 0; p < panels; p++)
            for (int j = 0; j < 2; j++) {
                // Finite, so that keys hidden from every query so far leave no infinity minus infinity.
                highest[p][j] = splat(-1e30f);
                totals[p][j] = f32{};
            }
        const long start = op.window ? std::max(s.base, (first - op.window + 1) / GATHERED * GATHERED) : s.base;
        for (long at = start; at <= last; at += KEYS) {
            const long keys = std::min(KEYS, ceil_div(last + 1 - at, WIDE_FEATURES) * WIDE_FEATURES);
            const float* k = s.k + (kv_head * s.padded + at - s.base) * d;
            const float* v = s.v + kv_head * d * s.padded + at - s.base;
            const long there = std::min(keys, s.base + s.padded - at);
            // Panels before this one see nothing of the block. All others pass a tile while it is in the cache.
            const long begin = op.whole ? 0 : std::max(0L, (at - first) / WIDE_TOKENS);
            score(k, there, begin, panels);
            for (long p = begin; p < panels; p++) {
                hide(at, keys, op.whole ? first : first + p * WIDE_TOKENS, p);
                soften(keys, p);
            }
            add(v, s.padded, there, begin, panels);
        }
        for (long p = 0; p < panels; p++) put(row + p * WIDE_TOKENS, item.head, count - p * WIDE_TOKENS, p);
    }

private:
    static constexpr long KEYS = 96;  // whose scores are held at once; whole tiles of features
    static constexpr long PANELS = QUERIES / WIDE_TOKENS;
    // A query's running maximum is left as it is while scores exceed it by less than this: weights stay far from
    // overflow, and the output is seldom rescaled. Source: FlashAttention-4 (2025).
    static constexpr float MAX_GROWTH = 5.5f;

    float* query_panel(long p) const { return queries + p * d * WIDE_TOKENS; }
    float* output_panel(long p) const { return output + p * output_floats; }
    float* score_panel(long p) const { return scores + p * KEYS * WIDE_TOKENS; }

    // Queries of one head as [D][tokens], scaled; those that are not there are zero.
    void pack(long row, long head, long count, long p) {
        float* out = query_panel(p);
        for (long k = 0; k < d; k++)
            for (long t = 0; t < WIDE_TOKENS; t++)
                out[k * WIDE_TOKENS + t] =
                    t < count ? load1(op.q + (row + t) * op.q_stride_t + head * op.q_stride_h + k) * op.scale : 0;
    }

    // Scores of `count` keys with the queries of panels [begin, end).
    void score(const float* k, long count, long begin, long end) {
        memset(score_panel(begin), 0, (end - begin) * KEYS * WIDE_TOKENS * sizeof(float));
        for (long i = 0; i < count; i += WIDE_FEATURES)
            for (long p = begin; p < end; p++)
                wide_tile(k + i * d, d, query_panel(p), d, score_panel(p) + i * WIDE_TOKENS);
    }

    // Hides keys [at, at + count) from the queries that do not see them; the first query stands at position `first`.
    void hide(long at, long count, long first, long p) {
        const long end = op.whole ? first : first + WIDE_TOKENS - 1;
        if (at + count <= first + 1 && (!op.window || at > end - op.window)) return;
        for (int j = 0; j < 2; j++) {
            i32 position = i32{} + int(first);
            for (int t = 0; t < LANES && !op.whole; t++) position[t] += j * LANES + t;
            const i32 oldest = op.window ? position - int(op.window) : i32{} - 1;
            float* column = score_panel(p) + j * LANES;
            for (long i = 0; i < count; i++, column += WIDE_TOKENS) {
                const i32 key = i32{} + int(at + i);
                store(column, (key <= position) & (key > oldest) ? load(column) : splat(-INF));
            }
        }
    }

    // Scores to weights, in place.
    void soften(long count, long p) {
        for (int j = 0; j < 2; j++) {
            float* column = score_panel(p) + j * LANES;
            f32 &m = highest[p][j], &l = totals[p][j], top = load(column);
            for (long i = 1; i < count; i++) top = max(top, load(column + i * WIDE_TOKENS));
            if (max1(top - m) > MAX_GROWTH) {
                const f32 now = max(m, top), fade = exp(m - now);
                m = now;
                l *= fade;
                float* o = output_panel(p) + j * LANES;
                for (long i = 0; i < d; i++) store(o + i * WIDE_TOKENS, load(o + i * WIDE_TOKENS) * fade);
            }
            for (long i = 0; i < count; i++) {
                const f32 weight = exp(load(column + i * WIDE_TOKENS) - m);
                store(column + i * WIDE_TOKENS, weight);
                l += weight;
            }
        }
    }

    // output[D][tokens] += values[D][keys] weights[keys][tokens], of panels [begin, end).
    void add(const float* v, long stride, long count, long begin, long end) {
        // A last tile reads rows beyond the D that there are; nobody reads what it makes of them.
        for (long i = 0; i < d; i += WIDE_FEATURES)
            for (long p = begin; p < end; p++)
                wide_tile(v + i * stride, stride, score_panel(p), count, output_panel(p) + i * WIDE_TOKENS);
    }

    void put(long row, long head, long count, long p) {
        const float* o = output_panel(p);
        float tops[WIDE_TOKENS], sums[WIDE_TOKENS];
        for (int j = 0; j < 2; j++) {
            store(tops + j * LANES, highest[p][j]);
            store(sums + j * LANES, totals[p][j]);
        }
        for (long t = 0; t < std::min<long>(WIDE_TOKENS, count); t++) {
            const float inverse = 1.0f / sums[t];
            E* out = op.out + ((row + t) * op.num_heads + head) * d;
            for (long i = 0; i < d; i++) store1(out + i, o[i * WIDE_TOKENS + t] * inverse);
            op.lse[(row + t) * op.num_heads + head] = tops[t] + std::log(sums[t]);
        }
    }

    const Attention<E>& op;
    const long d;
    long output_floats;
    float *queries, *output, *scores;  // [panel][D][tokens], [panel][D][tokens], [panel][keys][tokens]
    f32 highest[PANELS][2], totals[PANELS][2];
};

}  // namespace ab
