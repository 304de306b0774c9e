// Attention of many new tokens over the paged cache: what all ways of computing it share.
//
// Everything is computed transposed: scores are [keys][queries], so that keys are the left operand as they
// lie and a query's softmax runs down a lane without any horizontal step; the output is [D][queries], whose
// left operand is V transposed, made once per call. Source: FlashAttention (Dao et al. 2022), algorithm 1.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "team.h"
#include "vec.h"

namespace ab {

constexpr long GATHERED = 32;  // keys that are copied at a time

// A sequence's keys [base, base + padded) copied together: k [K][padded][D], v [K][D][padded].
template <class G>
struct PrefillSequence {
    long sequence, num_new, context, base, padded;
    G *k, *v;
};

struct PrefillItem {
    long index, head, query;  // of the sequences here; query head; first query token of the new ones
};

// A way of computing, `Way`, has the type `Element` and the type `Gathered` of copied keys and values, QUERIES tokens
// of one head in one piece of work, SPARE_ROWS that it may read behind the values, and, made on each thread: gather, of
// GATHERED keys of one KV head; attend, a piece.
template <class Way>
void attention_long(const Attention<typename Way::Element>& op, int threads) {
    typedef PrefillSequence<typename Way::Gathered> Sequence;
    static thread_local std::vector<Sequence> sequences;
    static thread_local std::vector<PrefillItem> items;
    static thread_local Scratch scratch;
    sequences.clear();
    items.clear();
    const long d = op.head_dim;
    long elements = 0, gathers = 0, longest = 0;
    for (long b = 0; b < op.num_sequences; b++) {
        const long num_new = op.num_new(b), context = op.lens[b];
        if (num_new <= op.max_short) continue;
        const long base = op.window ? std::max(0L, context - num_new - op.window + 1) / GATHERED * GATHERED : 0;
        // An odd number of 64-byte lines per row of V transposed keeps its rows off each other's cache sets.
        const long padded = (ceil_div(context - base, GATHERED) | 1) * GATHERED;
        sequences.push_back({b, num_new, context, base, padded, nullptr, nullptr});
        elements += 2 * op.num_kv_heads * padded * d;
        longest = std::max(longest, padded);
        gathers += op.num_kv_heads * padded / GATHERED;
        const long tiles = ceil_div(num_new, Way::QUERIES);
        for (long tile = tiles - 1; tile >= 0; tile--)
            for (long head = 0; head < op.num_heads; head++)
                items.push_back({long(sequences.size()) - 1, head, tile * Way::QUERIES});
    }
    if (items.empty()) return;
    elements += Way::SPARE_ROWS * longest;
    auto at = (typename Way::Gathered*)scratch.get(elements * sizeof(typename Way::Gathered));
    for (auto& s : sequences) {
        s.k = at;
        s.v = at + op.num_kv_heads * s.padded * d;
        at = s.v + op.num_kv_heads * s.padded * d;
    }
    Sequence* all = sequences.data();
    const PrefillItem* todo = items.data();
    const long num_items = long(items.size());
    long next = 0;
    parallel(threads, num_items * Way::QUERIES * d * 16, [&](int rank, int size) {
        Way way(op);
        const long from = gathers * rank / size, to = gathers * (rank + 1) / size;
        long start = 0;
        for (Sequence* s = all; start < gathers; s++) {
            const long blocks = s->padded / GATHERED, end = start + op.num_kv_heads * blocks;
            for (long i = std::max(from, start); i < std::min(to, end); i++)
                way.gather(*s, (i - start) / blocks, (i - start) % blocks * GATHERED);
            start = end;
        }
        if (size > 1) {
#pragma omp barrier
        }
        way.begin();
        for (;;) {
            const long i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (i >= num_items) break;
            way.attend(all[todo[i].index], todo[i]);
        }
    });
}

}  // namespace ab
