// Attention of single tokens over the paged cache.
//
// A piece of work is a query token and a span of its context, with all heads: the cache is read once, in the
// order in which it lies. Where there are few tokens and long contexts, spans become pieces of their own and
// are merged by log-sum-exp. Source: Flash-Decoding (Dao et al. 2023).
#pragma once

#include <vector>

#include "attention.h"
#include "heads.h"
#include "team.h"

namespace ab {

constexpr long MIN_SPLIT = 128;  // tokens that are worth a piece of their own
constexpr long PIECES_PER_THREAD = 4;

// A query token: its row, its sequence, and the tokens [from, to) that it sees.
struct DecodeRow {
    long row, sequence, from, to;
};

// A piece's result: o[H][D] unnormalised, then m[H] and l[H].
inline long part_floats(long heads, long d) { return heads * (d + 2); }

// Fetches the rows of a span into the cache while another span is computed.
template <class E>
struct Fetch {
    const E* rows[2 * SPAN];
    int count = 0, at = 0;
    long row_bytes;

    void some(int num_rows) {
        for (; num_rows > 0 && at < count; num_rows--, at++)
            for (long line = 0; line < row_bytes; line += 64) __builtin_prefetch((const char*)rows[at] + line, 0, 2);
    }
};

template <class E>
void attend_piece(const Attention<E>& op, const DecodeRow& row, long from, long to, float* part) {
    const long d = op.head_dim, group = op.group();
    float *o = part, *m = part + op.num_heads * d, *l = m + op.num_heads;
    std::fill(o, m, 0.0f);
    std::fill(m, l, -INF);
    std::fill(l, l + op.num_heads, 0.0f);
    Fetch<E> fetch;
    fetch.row_bytes = op.row() * long(sizeof(E));
    const int rows_per_head = int(ceil_div(2 * SPAN, op.num_kv_heads));
    for (long at = from; at < to; at += SPAN) {
        const int count = int(std::min<long>(SPAN, to - at));
        const E *keys[SPAN], *values[SPAN];
        op.each_token(row.sequence, at, count, [&](long i, long offset) {
            keys[i] = op.k + offset;
            values[i] = op.v + offset;
        });
        std::fill(keys + count, keys + SPAN, keys[count - 1]);
        std::fill(values + count, values + SPAN, values[count - 1]);
        fetch.at = 0;
        fetch.count = 2 * int(std::max(0L, std::min<long>(SPAN, to - at - SPAN)));
        op.each_token(row.sequence, at + SPAN, fetch.count / 2, [&](long i, long offset) {
            fetch.rows[2 * i] = op.k + offset;
            fetch.rows[2 * i + 1] = op.v + offset;
        });
        for (long h = 0; h < op.num_kv_heads; h++) {
            fetch.some(rows_per_head);
            const long head = h * group;
            attend_group(keys, values, count, op.q + row.row * op.q_stride_t + head * op.q_stride_h, op.q_stride_h, d,
                         op.scale, group, o + head * d, m + head, l + head);
            for (int i = 0; i < SPAN; i++) {
                keys[i] += d;
                values[i] += d;
            }
        }
    }
}

// Merges a token's `splits` partial results and writes its output and LSE.
template <class E>
void finish_row(const Attention<E>& op, const DecodeRow& row, float* part, long splits) {
    const long d = op.head_dim, heads = op.num_heads, stride = part_floats(heads, d);
    for (long h = 0; h < heads; h++) {
        const float* m = part + heads * d + h;
        float* l = part + heads * (d + 1) + h;
        float top = -INF, total = 0;
        for (long s = 0; s < splits; s++) top = std::max(top, m[s * stride]);
        for (long s = 0; s < splits; s++) total += l[s * stride] * std::exp(m[s * stride] - top);
        for (long s = 0; s < splits; s++) l[s * stride] = std::exp(m[s * stride] - top) / total;
        op.lse[row.row * heads + h] = top + std::log(total);
        for (long i = 0; i < d; i += LANES) {
            f32 value{};
            for (long s = 0; s < splits; s++) value += load(part + s * stride + h * d + i) * l[s * stride];
            store(op.out + (row.row * heads + h) * d + i, value);
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
            const long to = op.whole ? op.lens[b] : op.lens[b] - num_new + i + 1;
            const long from = op.window ? std::max(0L, to - op.window) : 0;
            rows.push_back({op.starts[b] + i, b, from, to});
            work += to - from;
            longest = std::max(longest, to - from);
        }
    }
    const long num_rows = long(rows.size());
    if (num_rows == 0) return;
    const long wanted = threads > 1 ? ceil_div(PIECES_PER_THREAD * threads, num_rows) : 1;
    const long splits = std::max(1L, std::min(wanted, longest / MIN_SPLIT));
    const long stride = part_floats(op.num_heads, op.head_dim);
    float* parts = (float*)scratch.get(num_rows * splits * stride * sizeof(float));
    const DecodeRow* all = rows.data();
    long next = 0, next_merge = 0;
    parallel(threads, work * op.row(), [&](int, int size) {
        for (;;) {
            const long item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (item >= num_rows * splits) break;
            const DecodeRow& row = all[item / splits];
            const long s = item % splits, length = row.to - row.from;
            float* part = parts + item * stride;
            attend_piece(op, row, row.from + length * s / splits, row.from + length * (s + 1) / splits, part);
            if (splits == 1) finish_row(op, row, part, 1);
        }
        if (splits == 1) return;
        if (size > 1) {
#pragma omp barrier
        }
        for (;;) {
            const long r = __atomic_fetch_add(&next_merge, 1, __ATOMIC_RELAXED);
            if (r >= num_rows) break;
            finish_row(op, all[r], parts + r * splits * stride, splits);
        }
    });
}

}  // namespace ab
