// Attention of single tokens over the paged cache.
//
// The tokens of all contexts, one after another, are cut into as many pieces of one length as there are threads;
// a piece reads the cache once, with all heads, and fetches what comes next while it computes. A context that is
// cut is merged by log-sum-exp. Source: Flash-Decoding (Dao et al. 2023).
#pragma once

#include <vector>

#include "attention.h"
#include "heads.h"
#include "team.h"
#include "tile.h"

namespace ab {

constexpr long MIN_PIECE = 64;  // tokens that are worth a thread
constexpr long TILE_ROWS = 16;

// A query token: its row, its sequence, the tokens [from, to) that it sees, and their place among all tokens.
struct DecodeRow {
    long row, sequence, from, to, first;
    long last() const { return first + to - from; }
};

// A piece's result for one row: o[H][D] unnormalised, then m[H] and l[H].
inline long part_floats(long heads, long d) { return heads * (d + 2); }

// Some consecutive tokens of one row, and where their keys and values are.
template <class E>
struct Span {
    const DecodeRow* row = nullptr;
    int count = 0;
    bool aligned = false;  // begins with a sixteen of its context
    const E *keys[SPAN], *values[SPAN];

    void set(const Attention<E>& op, const DecodeRow& of, long at, long to) {
        row = &of;
        count = int(std::min<long>(SPAN, to - at));
        aligned = at % TILE_ROWS == 0;
        op.each_token(of.sequence, at, count, [&](long i, long offset) {
            keys[i] = op.k + offset;
            values[i] = op.v + offset;
        });
        std::fill(keys + count, keys + SPAN, keys[count - 1]);
        std::fill(values + count, values + SPAN, values[count - 1]);
    }

    // Fetches some of it into the cache: part `part` of `parts`.
    void fetch(int part, int parts, long row_bytes) const {
        for (int i = count * part / parts; i < count * (part + 1) / parts; i++)
            for (long line = 0; line < row_bytes; line += 64) {
                __builtin_prefetch((const char*)keys[i] + line, 0, 2);
                __builtin_prefetch((const char*)values[i] + line, 0, 2);
            }
    }
};

// Scores of one KV head's queries by dot products.
template <class E>
struct DotScores {
    const Span<E>& span;
    const E* q;
    long q_stride, d, offset;

    template <int G>
    void get(long from, float* p) const {
        const E* keys[SPAN];
        for (int i = 0; i < SPAN; i++) keys[i] = span.keys[i] + offset;
        for (int b = 0; b < span.count; b += LANES) dot_keys<E, G>(keys + b, q + from * q_stride, q_stride, d, p + b);
    }
};

#if defined(AB_AMX)
// The same by tiles: sixteen keys, as they lie in a block, are the left operand.
struct TileScores {
    alignas(64) float c[SPAN / TILE][TILE * TILE];  // [key][head], then [head][key]

    // Whether each sixteen keys of a span lie one after another, with whatever follows them in the block.
    static bool fits(const Attention<bf16>& op) {
        return amx_allowed() && op.block_size % TILE == 0 && op.head_dim % TILE_K == 0 && op.group() <= TILE;
    }

    void compute(const Span<bf16>& span, long row, const bf16* panel, long d, long offset, long group) {
        const long stride = row * long(sizeof(bf16));
        const bf16* keys[SPAN / TILE];
        for (int b = 0; b < SPAN / TILE; b++) keys[b] = span.keys[b * TILE] + offset;
        const int blocks = (span.count + TILE - 1) / TILE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long k = 0; k < d; k += TILE_K) {
            _tile_loadd(6, panel + k * TILE, 64);
            _tile_loadd(4, keys[0] + k, stride);
            _tile_dpbf16ps(0, 4, 6);
            if (blocks > 1) {
                _tile_loadd(5, keys[1] + k, stride);
                _tile_dpbf16ps(1, 5, 6);
            }
            if (blocks > 2) {
                _tile_loadd(4, keys[2] + k, stride);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (blocks > 3) {
                _tile_loadd(5, keys[3] + k, stride);
                _tile_dpbf16ps(3, 5, 6);
            }
        }
        _tile_stored(0, c[0], 64);
        if (blocks > 1) _tile_stored(1, c[1], 64);
        if (blocks > 2) _tile_stored(2, c[2], 64);
        if (blocks > 3) _tile_stored(3, c[3], 64);
        for (int b = 0; b < blocks; b++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(c[b] + i * TILE);
            transpose16(r);
            for (long g = 0; g < group; g++) _mm512_storeu_si512(c[b] + g * TILE, r[g]);
        }
    }

    template <int G>
    void get(long from, float* p) const {
        for (int g = 0; g < G; g++)
            for (int b = 0; b < SPAN / TILE; b++) store(p + g * SPAN + b * TILE, load(c[b] + (from + g) * TILE));
    }
};
#endif

// Tokens [from, to) of all rows' tokens, one after another. A row that is whole in here is written; of one that
// is not, the result is left in `before`, where it began in another piece, or else in `after`.
template <class E, class Finish>
class DecodePiece {
public:
    DecodePiece(const Attention<E>& op, const DecodeRow* rows, long from, long to, float* before, float* after,
                const Finish& finish)
        : op(op), row(rows), from(from), to(to), before(before), after(after), finish(finish) {}

    void run() {
#if defined(AB_AMX)
        if constexpr (sizeof(E) == 2)
            if (TileScores::fits(op)) {
                const TileSession session;
                return run_spans<true>();
            }
#endif
        run_spans<false>();
    }

private:
    template <bool TILES>
    void run_spans() {
        Span<E> spans[2];
        Span<E>*now = &spans[0], *next = &spans[1];
        while (row->last() <= from) row++;
        at = from;
        if (!advance(*now)) return;
        const DecodeRow* begun = nullptr;
        while (now) {
            if (now->row != begun) begin<TILES>(*now->row);
            begun = now->row;
            if (!advance(*next)) next = nullptr;
            attend<TILES>(*now, next);
            if (!next || next->row != begun) {
                if (begun->first >= from && begun->last() <= to) finish(*begun, part);
            }
            std::swap(now, next);
            if (now == nullptr) break;
        }
    }

    // The next span, if there is one.
    bool advance(Span<E>& span) {
        if (at >= to) return false;
        while (at >= row->last()) row++;
        const long begin = row->from + at - row->first, end = row->from + std::min(to, row->last()) - row->first;
        // The first may be short, so that the others begin with sixteen keys of one block.
        span.set(op, *row, begin, begin % TILE_ROWS ? std::min(end, begin + TILE_ROWS - begin % TILE_ROWS) : end);
        at += span.count;
        return true;
    }

    template <bool TILES>
    void begin(const DecodeRow& of) {
        part = of.first < from ? before : after;
        const long d = op.head_dim;
        float *m = part + op.num_heads * d, *l = m + op.num_heads;
        std::fill(part, m, 0.0f);
        std::fill(m, l, -INF);
        std::fill(l, l + op.num_heads, 0.0f);
#if defined(AB_AMX)
        if constexpr (TILES) {
            panels.resize(op.num_kv_heads * d * TILE);
            for (long h = 0; h < op.num_kv_heads; h++)
                for (long k = 0; k < d; k += TILE_K)
                    pack_step(queries(of, h) + k, op.q_stride_h, int(op.group()), panels.data() + (h * d + k) * TILE);
        }
#endif
    }

    const E* queries(const DecodeRow& of, long kv_head) const {
        return op.q + of.row * op.q_stride_t + kv_head * op.group() * op.q_stride_h;
    }

    template <bool TILES>
    void attend(const Span<E>& span, const Span<E>* next) {
        const long d = op.head_dim, group = op.group(), row_bytes = op.row() * long(sizeof(E));
        float *o = part, *m = part + op.num_heads * d, *l = m + op.num_heads;
        const E* values[SPAN];
        std::copy(span.values, span.values + SPAN, values);
        for (long h = 0; h < op.num_kv_heads; h++) {
            if (next) next->fetch(int(h), int(op.num_kv_heads), row_bytes);
            const long head = h * group;
            const auto go = [&](const auto& scores) {
                attend_group<E>(scores, values, span.count, d, op.scale, group, o + head * d, m + head, l + head);
            };
#if defined(AB_AMX)
            if constexpr (TILES)
                if (span.aligned) {
                    tiles.compute(span, op.row(), panels.data() + h * d * TILE, d, h * d, group);
                    go(tiles);
                }
            if (!TILES || !span.aligned)
#endif
                go(DotScores<E>{span, queries(*span.row, h), op.q_stride_h, d, h * d});
            for (int i = 0; i < SPAN; i++) values[i] += d;
        }
    }

    const Attention<E>& op;
    const DecodeRow* row;
    const long from, to;
    float *const before, *const after;
    const Finish& finish;
    long at = 0;
    float* part = nullptr;
    std::vector<E> panels;
#if defined(AB_AMX)
    TileScores tiles;
#endif
};

// Merges a row's partial results and writes its output and LSE.
template <class E>
void finish_row(const Attention<E>& op, const DecodeRow& row, float* const* parts, long count) {
    const long d = op.head_dim, heads = op.num_heads;
    for (long h = 0; h < heads; h++) {
        const long m = heads * d + h, l = m + heads;
        float top = -INF, total = 0;
        for (long s = 0; s < count; s++) top = std::max(top, parts[s][m]);
        for (long s = 0; s < count; s++) total += parts[s][l] * std::exp(parts[s][m] - top);
        for (long s = 0; s < count; s++) parts[s][l] = std::exp(parts[s][m] - top) / total;
        op.lse[row.row * heads + h] = top + std::log(total);
        for (long i = 0; i < d; i += LANES) {
            f32 value{};
            for (long s = 0; s < count; s++) value += load(parts[s] + h * d + i) * parts[s][l];
            store(op.out + (row.row * heads + h) * d + i, value);
        }
    }
}

template <class E>
void attention_short(const Attention<E>& op, int threads) {
    static thread_local std::vector<DecodeRow> rows;
    static thread_local Scratch scratch;
    rows.clear();
    long total = 0;
    for (long b = 0; b < op.num_sequences; b++) {
        const long num_new = op.num_new(b);
        if (num_new > op.max_short) continue;
        for (long i = 0; i < num_new; i++) {
            const long to = op.whole ? op.lens[b] : op.lens[b] - num_new + i + 1;
            const long from = op.window ? std::max(0L, to - op.window) : 0;
            if (to <= from) continue;
            rows.push_back({op.starts[b] + i, b, from, to, total});
            total += to - from;
        }
    }
    if (rows.empty()) return;
    // Pieces are cut by what was asked for, not by how many threads come: the same bits either way.
    const long pieces = std::max(1L, std::min<long>(threads, total / MIN_PIECE));
    const long stride = part_floats(op.num_heads, op.head_dim);
    float* parts = (float*)scratch.get(2 * pieces * stride * sizeof(float));
    const DecodeRow *all = rows.data(), *end = all + rows.size();
    const auto begin = [&](long piece) { return total * piece / pieces; };
    parallel(int(std::min<long>(threads, pieces)), total * op.row(), [&](int rank, int size) {
        const auto finish = [&](const DecodeRow& row, float* part) { finish_row(op, row, &part, 1); };
        const long first = pieces * rank / size, last = pieces * (rank + 1) / size;
        for (long p = first; p < last; p++)
            DecodePiece<E, decltype(finish)>(op, all, begin(p), begin(p + 1), parts + 2 * p * stride,
                                             parts + (2 * p + 1) * stride, finish).run();
        if (pieces == 1) return;
        if (size > 1) {
#pragma omp barrier
        }
        std::vector<float*> of_row;
        for (const DecodeRow* row = all; row < end; row++) {
            // The piece that the row begins in merges it.
            long p = row->first * pieces / total;
            while (begin(p + 1) <= row->first) p++;
            while (begin(p) > row->first) p--;
            if (p < first || p >= last || begin(p + 1) >= row->last()) continue;
            of_row.assign(1, parts + (2 * p + 1) * stride);
            for (p++; p < pieces && begin(p) < row->last(); p++) of_row.push_back(parts + 2 * p * stride);
            finish_row(op, *row, of_row.data(), long(of_row.size()));
        }
    });
}

}  // namespace ab
