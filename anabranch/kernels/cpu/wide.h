// Products of any number of rows of x with weight rows, in float32 whatever the elements are.
//
// y is computed transposed: the lanes of a vector are tokens, and a weight is multiplied with all of them. x is packed
// once per call into panels of floats, [k][tokens]; weights are read as they lie, some rows and some k at a time, and
// widened to floats in the first-level cache. Every output is the sum of its products in the order of k, so its bits
// depend neither on the other rows of x nor on the number of threads.
#pragma once

#include <algorithm>

#include "dot.h"
#include "elementwise.h"
#include "team.h"
#include "vec.h"

namespace ab {

// A tile is some features of a panel, two vectors of tokens. Its sums take most registers; the rest hold x and a weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE_FEATURES = 12;
#else
constexpr int WIDE_FEATURES = 6;
#endif
constexpr int WIDE_TOKENS = 2 * LANES;
constexpr long WIDE_K = 256;               // most weights of a row that are widened at once
constexpr long WIDE_STRIDE = WIDE_K + 16;  // keeps rows off each other's cache sets
constexpr long WIDE_BYTES = 384 << 10;     // of x: what should stay in a second-level cache
constexpr int MAX_PANELS = 8;

// What a tile fetches meanwhile: `step` bytes of each of these rows for every 16 k.
struct RowsAhead {
    const char* rows[WIDE_FEATURES];
    long step;
};

// sums[feature][token] += w[feature] . x[token], over k of a block; between blocks the sums are in memory.
inline void wide_tile(const float* w, long stride, const float* panel, long count, float* sums,
                      const RowsAhead* ahead = nullptr) {
    f32 acc[WIDE_FEATURES][2];
    for (int f = 0; f < WIDE_FEATURES; f++)
        for (int j = 0; j < 2; j++) acc[f][j] = load(sums + f * WIDE_TOKENS + j * LANES);
    for (long k = 0; k < count;) {
        if (ahead)
            for (int f = 0; f < WIDE_FEATURES; f++) __builtin_prefetch(ahead->rows[f] + k / 16 * ahead->step);
        for (const long stop = std::min(count, k + 16); k < stop; k++) {
            const f32 x[2] = {load(panel + k * WIDE_TOKENS), load(panel + k * WIDE_TOKENS + LANES)};
            for (int f = 0; f < WIDE_FEATURES; f++) {
                const f32 weight = splat(w[f * stride + k]);
                for (int j = 0; j < 2; j++) acc[f][j] = multiply_add(x[j], weight, acc[f][j]);
            }
        }
    }
    for (int f = 0; f < WIDE_FEATURES; f++)
        for (int j = 0; j < 2; j++) store(sums + f * WIDE_TOKENS + j * LANES, acc[f][j]);
}

template <class E>
inline void widen(const E* from, long count, float* to) {
    long k = 0;
    for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
    for (; k < count; k++) to[k] = load1(from + k);
}

// Threads take tiles of features from a counter, so one that the system takes away holds up one tile. All panels of a
// chunk pass a tile while its weights are in the cache, and all tiles pass a chunk while its x is.
template <class E>
class WideLinear {
public:
    WideLinear(const Linear<E>& op, float* x)
        : op(op), x(x), block(ceil_div(ceil_div(op.num_channels, ceil_div(op.num_channels, WIDE_K)), 16) * 16) {}

    static long num_floats(const Linear<E>& op) { return num_panels(op) * WIDE_TOKENS * op.num_channels; }

    // The part of thread `rank`: packs, meets the others, multiplies.
    void run(int rank, int size, long* next) const {
        const long panels = num_panels(op), blocks = ceil_div(op.num_channels, block), packs = panels * blocks;
        for (long i = packs * rank / size; i < packs * (rank + 1) / size; i++) pack(i / blocks, i % blocks * block);
        if (size > 1) {
#pragma omp barrier
        }
        const long chunk = std::max(1L, std::min<long>(MAX_PANELS, WIDE_BYTES / (WIDE_TOKENS * op.num_channels * 4)));
        const long tiles = ceil_div(op.num_units(), units_of_tile()), items = ceil_div(panels, chunk) * tiles;
        const long grain = std::max(1L, items / (size * 16L));
        for (;;) {
            const long from = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED);
            if (from >= items) return;
            for (long i = from; i < std::min(items, from + grain); i++)
                multiply(i % tiles, i / tiles * chunk, std::min(panels, (i / tiles + 1) * chunk));
        }
    }

private:
    static long num_panels(const Linear<E>& op) { return ceil_div(op.num_rows, WIDE_TOKENS); }
    long units_of_tile() const { return op.gated ? WIDE_FEATURES / 2 : WIDE_FEATURES; }
    float* panel(long p) const { return x + p * WIDE_TOKENS * op.num_channels; }

    // The i-th feature of a tile of `units`: gates, then their partners. What a last tile lacks is another's again.
    long feature(long unit, long units, long i) const {
        const bool partner = op.gated && i >= units_of_tile();
        return unit + std::min(units - 1, partner ? i - units_of_tile() : i) + (partner ? op.num_units() : 0);
    }

    void pack(long p, long k0) const {
        const long from = p * WIDE_TOKENS, count = std::min<long>(WIDE_TOKENS, op.num_rows - from);
        const long to = std::min(op.num_channels, k0 + block);
        float* out = panel(p) + k0 * WIDE_TOKENS;
        for (long k = k0; k < to; k++, out += WIDE_TOKENS) {
            for (long t = 0; t < count; t++) out[t] = load1(op.x + (from + t) * op.x_stride + k);
            for (long t = count; t < WIDE_TOKENS; t++) out[t] = 0;
        }
    }

    // A tile of features of the panels [from, to).
    void multiply(long tile, long from, long to) const {
        alignas(64) float w[WIDE_FEATURES * WIDE_STRIDE], sums[MAX_PANELS][WIDE_FEATURES * WIDE_TOKENS];
        const long unit = tile * units_of_tile(), units = std::min(units_of_tile(), op.num_units() - unit);
        const E* rows[WIDE_FEATURES];
        for (long i = 0; i < WIDE_FEATURES; i++) rows[i] = op.weight + feature(unit, units, i) * op.num_channels;
        memset(sums, 0, (to - from) * sizeof sums[0]);
        RowsAhead ahead;
        ahead.step = 16 * sizeof(E);
        for (long k = 0; k < op.num_channels; k += block) {
            const long count = std::min(block, op.num_channels - k);
            // The rows' next k, or the first of the next tile.
            const long next = k + count < op.num_channels ? k + count : units * op.num_channels;
            for (long i = 0; i < WIDE_FEATURES; i++) {
                widen(rows[i] + k, count, w + i * WIDE_STRIDE);
                ahead.rows[i] = (const char*)(rows[i] + next);
            }
            for (long p = from; p < to; p++)
                wide_tile(w, WIDE_STRIDE, panel(p) + k * WIDE_TOKENS, count, sums[p - from],
                          p == from ? &ahead : nullptr);
        }
        for (long p = from; p < to; p++) put(unit, units, p * WIDE_TOKENS, sums[p - from]);
    }

    void put(long unit, long units, long row, float* sums) const {
        const long count = std::min<long>(WIDE_TOKENS, op.num_rows - row);
        if (op.bias)
            for (long i = 0; i < WIDE_FEATURES; i++) {
                const float bias = load1(op.bias + feature(unit, units, i));
                for (long t = 0; t < WIDE_TOKENS; t++) sums[i * WIDE_TOKENS + t] += bias;
            }
        if (op.gated)
            for (long i = 0; i < units; i++) gate(sums + i * WIDE_TOKENS, sums + (i + units_of_tile()) * WIDE_TOKENS);
        for (long t = 0; t < count; t++) {
            E* out = op.out + (row + t) * op.out_stride + unit;
            for (long i = 0; i < units; i++) store1(out + i, sums[i * WIDE_TOKENS + t]);
        }
    }

    // gate = silu(gate) * up, rounded where separate passes would round.
    void gate(float* gate, const float* up) const {
        for (long t = 0; t < WIDE_TOKENS; t += LANES) {
            const f32 left = rounded(silu(rounded(load(gate + t), op.x)), op.x);
            store(gate + t, left * rounded(load(up + t), op.x));
        }
    }

    const Linear<E>& op;
    float* const x;
    const long block;  // of k: all of them alike, so that one always fetches what the next needs
};

template <class E>
void linear_wide(const Linear<E>& op, int threads) {
    static thread_local Scratch scratch;
    const WideLinear<E> wide(op, (float*)scratch.get(WideLinear<E>::num_floats(op) * sizeof(float)));
    long next = 0;
    parallel(threads, op.num_features * op.num_channels, [&](int rank, int size) { wide.run(rank, size, &next); });
}

}  // namespace ab
