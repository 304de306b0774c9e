// Attention of many new tokens by bf16 tiles; see prefill.h.
#pragma once

#include <optional>

#include "prefill.h"
#include "tile.h"

#if defined(AB_TILES)
namespace ab {

constexpr long QUERIES = 2 * TILE;  // query tokens of one head in one piece of work
constexpr long KEYS = 128;          // keys whose scores are held at once

// 32 rows of 32 elements, transposed.
inline void transpose32(const bf16* const rows[32], long column, bf16* out, long out_stride) {
    alignas(64) static const uint16_t even[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                  32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    __m512i low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = rows[i] ? _mm512_loadu_si512(rows[i] + column) : _mm512_setzero_si512();
        high[i] = rows[i + 16] ? _mm512_loadu_si512(rows[i + 16] + column) : _mm512_setzero_si512();
    }
    transpose16(low);
    transpose16(high);
    const __m512i first = _mm512_load_si512(even), second = _mm512_add_epi16(first, _mm512_set1_epi16(1));
    for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(out + 2 * i * out_stride, _mm512_permutex2var_epi16(low[i], first, high[i]));
        _mm512_storeu_si512(out + (2 * i + 1) * out_stride, _mm512_permutex2var_epi16(low[i], second, high[i]));
    }
}

// Copies 32 tokens of one KV head out of the pool; those beyond the context are zero.
inline void gather_keys(const Attention<bf16>& op, const PrefillSequence<bf16>& s, long kv_head, long at) {
    const long d = op.head_dim;
    bf16* k = s.k + (kv_head * s.padded + at) * d;
    bf16* v = s.v + kv_head * d * s.padded + at;
    const bf16* values[32] = {};
    const long count = std::max(0L, std::min<long>(32, s.context - s.base - at));
    op.each_token(s.sequence, s.base + at, count, [&](long i, long offset) {
        memcpy(k + i * d, op.k + offset + kv_head * d, d * sizeof(bf16));
        values[i] = op.v + offset + kv_head * d;
    });
    memset(k + count * d, 0, (32 - count) * d * sizeof(bf16));
    for (long column = 0; column < d; column += 32) transpose32(values, column, v + column * s.padded, s.padded);
}

// 2^x, to about 4e-6; 0 for -inf.
inline __m512 exp2(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 1);  // x - floor(x); 0 for infinities
    __m512 y = _mm512_set1_ps(1.3534167e-2f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.2011464e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4144275e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9300383e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(y, x);  // times 2^floor(x)
}

// What a thread works in. Rows of scores and outputs are 32 queries. Scores and weights are double: AMX reads
// and writes memory, and what it has just written, or what has just been written for it, is slow to arrive.
struct PrefillScratch {
    alignas(64) float scores[2][KEYS * QUERIES];
    alignas(64) bf16 weights[2][2 * KEYS * TILE];
    float* output;  // [D][QUERIES]
    bf16* queries;  // two panels of D / 32 steps
};

// A query's running maximum is left as it is while new scores exceed it by less than 2^8 in weight: weights
// stay far from overflow, and the output is seldom rescaled. Source: FlashAttention-4 (2025).
constexpr float MAX_GROWTH = 8.0f;

// Hides from 16 queries, the first at position `first`, the keys that they do not see.
inline void hide(const Attention<bf16>& op, float* column, long at, long count, long first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i position =
        op.whole ? _mm512_set1_epi32(int(first)) : _mm512_add_epi32(lanes, _mm512_set1_epi32(int(first)));
    const __m512i oldest =
        op.window ? _mm512_sub_epi32(position, _mm512_set1_epi32(int(op.window))) : _mm512_set1_epi32(-1);
    for (long i = 0; i < count; i++) {
        const __m512i key = _mm512_set1_epi32(int(at + i));
        const __mmask16 seen = _mm512_cmple_epi32_mask(key, position) & _mm512_cmpgt_epi32_mask(key, oldest);
        const __m512 score = _mm512_load_ps(column + i * QUERIES);
        _mm512_store_ps(column + i * QUERIES, _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INF), score));
    }
}

// Scores of `count` keys with 16 queries to weights, [count / 2][16][2]; m and l are the running maximum of the
// scaled scores, in powers of two, and the sum of weights.
inline void soften(float scale_log2, const float* column, long count, bf16* panel, __m512& m, __m512& l, float* output,
                   long d) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i zipped = _mm512_load_si512(zip);
    const __m512 scale = _mm512_set1_ps(scale_log2);
    __m512 top[4];
    for (int j = 0; j < 4; j++) top[j] = _mm512_set1_ps(-INF);
    for (long i = 0; i < count; i += 4)
        for (int j = 0; j < 4; j++) top[j] = _mm512_max_ps(top[j], _mm512_load_ps(column + (i + j) * QUERIES));
    const __m512 highest =
        _mm512_mul_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])), scale);
    if (_mm512_cmp_ps_mask(_mm512_sub_ps(highest, m), _mm512_set1_ps(MAX_GROWTH), _CMP_GT_OQ)) {
        const __m512 now = _mm512_max_ps(m, highest), fade = exp2(_mm512_sub_ps(m, now));
        m = now;
        l = _mm512_mul_ps(l, fade);
        for (long i = 0; i < d; i++)
            _mm512_store_ps(output + i * QUERIES, _mm512_mul_ps(_mm512_load_ps(output + i * QUERIES), fade));
    }
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long i = 0; i < count; i += 2) {
        const __m512 a = exp2(_mm512_fmsub_ps(_mm512_load_ps(column + i * QUERIES), scale, m));
        const __m512 b = exp2(_mm512_fmsub_ps(_mm512_load_ps(column + (i + 1) * QUERIES), scale, m));
        total[0] = _mm512_add_ps(total[0], a);
        total[1] = _mm512_add_ps(total[1], b);
        const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        _mm512_store_si512(panel + i * TILE, _mm512_permutexvar_epi16(zipped, pair));
    }
    l = _mm512_add_ps(l, _mm512_add_ps(total[0], total[1]));
}

inline void attend_queries(const Attention<bf16>& op, const PrefillSequence<bf16>& s, const PrefillItem& item,
                           PrefillScratch& work) {
    const float log2e = 1.44269504088896341f, ln2 = 0.693147180559945309f;
    const long d = op.head_dim, steps = d / TILE_K, row0 = op.starts[s.sequence] + item.query;
    const long count = std::min(QUERIES, s.num_new - item.query);
    const long first = op.whole ? s.context - 1 : s.context - s.num_new + item.query;
    const long last = op.whole ? first : first + count - 1;
    const long kv_head = item.head / op.group();
    const bf16* k = s.k + kv_head * s.padded * d;
    const bf16* v = s.v + kv_head * d * s.padded;
    for (long n = 0; n < 2; n++)
        for (long step = 0; step < steps; step++)
            pack_step(op.q + (row0 + n * TILE) * op.q_stride_t + item.head * op.q_stride_h + step * TILE_K,
                      op.q_stride_t, int(std::min<long>(TILE, count - n * TILE)),
                      work.queries + (n * steps + step) * PANEL_STEP);
    const bf16* queries[2] = {work.queries, work.queries + steps * PANEL_STEP};
    std::fill(work.output, work.output + d * QUERIES, 0.0f);
    // Finite, so that keys hidden from every query so far leave no infinity minus infinity.
    __m512 m[2] = {_mm512_set1_ps(-1e30f), _mm512_set1_ps(-1e30f)}, l[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const long oldest = op.window ? std::max(0L, first - op.window + 1) / 32 * 32 : 0;
    const long start = std::max(oldest, s.base), blocks = ceil_div(last + 1 - start, KEYS);
    auto keys_of = [&](long block) { return std::min(KEYS, ceil_div(last + 1 - start - block * KEYS, 32) * 32); };
    auto score = [&](long block) {
        const bf16* rows = k + (start - s.base + block * KEYS) * d;
        for (long i = 0; i < keys_of(block); i += 2 * TILE) {
            const bf16* a[2] = {rows + i * d, rows + (i + TILE) * d};
            tile_gemm<2, 2>(a, d, queries, steps, work.scores[block % 2] + i * QUERIES, QUERIES, false);
        }
    };
    auto add = [&](long block) {
        const bf16* weights[2] = {work.weights[block % 2], work.weights[block % 2] + KEYS * TILE};
        const bf16* columns = v + start - s.base + block * KEYS;
        for (long i = 0; i < d; i += 2 * TILE) {
            const bf16* a[2] = {columns + i * s.padded, columns + (i + TILE) * s.padded};
            tile_gemm<2, 2>(a, s.padded, weights, keys_of(block) / TILE_K, work.output + i * QUERIES, QUERIES, true);
        }
    };
    score(0);
    for (long block = 0; block < blocks; block++) {
        if (block + 1 < blocks) score(block + 1);
        if (block > 0) add(block - 1);
        const long at = start + block * KEYS, keys = keys_of(block);
        const bool masked = at + keys > first + 1 || (op.window && at <= first + QUERIES - 1 - op.window);
        for (long n = 0; n < 2; n++) {
            float* column = work.scores[block % 2] + n * TILE;
            if (masked) hide(op, column, at, keys, op.whole ? first : first + n * TILE);
            soften(op.scale * log2e, column, keys, work.weights[block % 2] + n * KEYS * TILE, m[n], l[n],
                   work.output + n * TILE, d);
        }
    }
    add(blocks - 1);
    for (long n = 0; n < 2; n++) {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), l[n]);
        const long tokens = std::min<long>(TILE, count - n * TILE);
        for (long i = 0; i < d; i += TILE) {
            __m512i r[16];
            for (int j = 0; j < 16; j++)
                r[j] = (__m512i)_mm512_mul_ps(_mm512_load_ps(work.output + (i + j) * QUERIES + n * TILE), inverse);
            transpose16(r);
            for (long t = 0; t < tokens; t++)
                store(op.out + ((row0 + n * TILE + t) * op.num_heads + item.head) * d + i, (f32)r[t]);
        }
        alignas(64) float tops[16], totals[16];
        _mm512_store_ps(tops, m[n]);
        _mm512_store_ps(totals, l[n]);
        for (long t = 0; t < tokens; t++)
            op.lse[(row0 + n * TILE + t) * op.num_heads + item.head] = tops[t] * ln2 + std::log(totals[t]);
    }
}

class PrefillByTiles {
public:
    typedef bf16 Element;
    typedef bf16 Gathered;
    static constexpr long QUERIES = ab::QUERIES, SPARE_ROWS = 0;

    explicit PrefillByTiles(const Attention<bf16>& op) : op(op) {
        static thread_local Scratch own;
        const long d = op.head_dim;
        work = (PrefillScratch*)own.get(sizeof(PrefillScratch) + d * QUERIES * (4 + 2) + 128);
        work->output = (float*)(work + 1);
        work->queries = (bf16*)(work->output + d * QUERIES);
    }

    void gather(const PrefillSequence<bf16>& s, long kv_head, long at) { gather_keys(op, s, kv_head, at); }
    void begin() { session.emplace(); }
    void attend(const PrefillSequence<bf16>& s, const PrefillItem& item) { attend_queries(op, s, item, *work); }

private:
    const Attention<bf16>& op;
    PrefillScratch* work;
    std::optional<TileSession> session;
};

}  // namespace ab
#endif
