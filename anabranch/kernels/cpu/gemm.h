// Products of many rows with a row-major weight matrix: blocks of weight rows are packed on the way, into a
// core's second-level cache, and meet all rows of x, which are the left operand as they lie in memory.
#pragma once

#include <algorithm>

#include "dot.h"
#include "tile.h"

#if defined(AB_TILES)
namespace ab {

constexpr long BLOCK_BYTES = 704 << 10;  // of packed weights; leaves room for rows of x in the cache
constexpr long MIN_UNITS = 4;            // column units that a thread should have before rows are shared out as well

// Beyond it a library's product is as fast or faster.
constexpr long MAX_BLOCKED_ROWS = 1024;

// A unit is the 32 columns of two panels: 32 output features, or 16 gates and their 16 partners.
struct Gemm {
    const Linear<bf16>& op;

    long steps() const { return op.num_channels / TILE_K; }
    long panel_elements() const { return steps() * PANEL_STEP; }
    long width() const { return op.gated ? TILE : 2 * TILE; }
    long num_units() const { return ceil_div(op.num_units() / TILE * TILE, width()); }
    // First feature of a unit's panel, or -1 where the last unit has but one.
    long feature(long unit, int n) const {
        if (op.gated) return unit * TILE + n * op.num_features / 2;
        const long f = unit * 2 * TILE + n * TILE;
        return f + TILE <= op.num_features ? f : -1;
    }

    void pack(long unit, bf16* to) const {
        for (int n = 0; n < 2; n++) {
            const long f = feature(unit, n);
            if (f < 0) continue;
            for (long k = 0; k < steps(); k++)
                pack_step(op.weight + f * op.num_channels + k * TILE_K, op.num_channels, TILE,
                          to + n * panel_elements() + k * PANEL_STEP);
        }
    }

    // A product whose result is still to be written: the tiles' own stores are slow to come back, so that one
    // product is written while the next is computed.
    struct Pending {
        float* c = nullptr;
        long t = 0, count = 0, unit = 0;
    };

    // Rows [t, t + count) of one unit; x is at least 32 rows long.
    void multiply(const bf16* x, long x_stride, const bf16* packed, const Pending& result) const {
        const bf16* a[2] = {x, x + TILE * x_stride};
        const bf16* b[2] = {packed, packed + panel_elements()};
        if (feature(result.unit, 1) < 0)
            tile_gemm<2, 1>(a, x_stride, b, steps(), result.c, 2 * TILE, false);
        else
            tile_gemm<2, 2>(a, x_stride, b, steps(), result.c, 2 * TILE, false);
    }

    void write(const Pending& result) const {
        const long first = feature(result.unit, 0), second = feature(result.unit, 1);
        const bool paired = second >= 0;
        const f32 bias[2] = {op.bias ? load(op.bias + first) : f32{}, op.bias && paired ? load(op.bias + second) : f32{}};
        for (long i = 0; i < result.count; i++) {
            bf16* out = op.out + (result.t + i) * op.out_stride;
            const f32 left = load(result.c + i * 2 * TILE) + bias[0];
            const f32 right = load(result.c + i * 2 * TILE + TILE) + bias[1];
            if (op.gated)
                store(out + first, rounded(silu(rounded(left, op.x)), op.x) * rounded(right, op.x));
            else if (paired)
                _mm512_storeu_si512(out + first, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
            else
                store(out + first, left);
        }
    }

    // Units [u0, u1) of rows [t0, t1); `packed` holds BLOCK_BYTES, `padded` 32 rows of x.
    void run(long u0, long u1, long t0, long t1, bf16* packed, long block, bf16* padded) const {
        constexpr long ROWS = 2 * TILE;
        const long whole = t0 + (t1 - t0) / ROWS * ROWS, channels = op.num_channels;
        alignas(64) float c[2][ROWS * ROWS];
        Pending pending;
        for (long i = whole; i < t1; i++) memcpy(padded + (i - whole) * channels, op.x + i * op.x_stride, channels * sizeof(bf16));
        memset(padded + (t1 - whole) * channels, 0, (ROWS - (t1 - whole)) * channels * sizeof(bf16));
        for (long from = u0; from < u1; from += block) {
            const long to = std::min(from + block, u1);
            for (long u = from; u < to; u++) pack(u, packed + (u - from) * 2 * panel_elements());
            for (long t = t0; t < t1; t += ROWS) {
                const bool tail = t == whole;
                for (long u = from; u < to; u++) {
                    const Pending now{pending.c == c[0] ? c[1] : c[0], t, std::min(ROWS, t1 - t), u};
                    multiply(tail ? padded : op.x + t * op.x_stride, tail ? channels : op.x_stride,
                             packed + (u - from) * 2 * panel_elements(), now);
                    if (pending.c) write(pending);
                    pending = now;
                }
            }
        }
        if (pending.c) write(pending);
    }
};

inline void linear_blocked(const Linear<bf16>& op, int threads) {
    const Gemm gemm{op};
    const long units = gemm.num_units(), unit_elements = 2 * gemm.panel_elements();
    const long fits = std::max(1L, BLOCK_BYTES / (unit_elements * long(sizeof(bf16))));
    parallel(threads, op.num_features * op.num_channels, [&](int rank, int size) {
        static thread_local Scratch scratch;
        // A grid of threads over columns and rows.
        int across = size;
        while (across > 1 && (size % across || units / across < MIN_UNITS)) across--;
        const int down = size / across, column = rank % across, row = rank / across;
        const long u0 = units * column / across, u1 = units * (column + 1) / across;
        const long tiles = ceil_div(op.num_rows, 2 * TILE);
        const long t0 = tiles * row / down * 2 * TILE, t1 = std::min(op.num_rows, tiles * (row + 1) / down * 2 * TILE);
        const long blocks = std::max(1L, ceil_div(u1 - u0, fits)), block = ceil_div(u1 - u0, blocks);
        bf16* packed = (bf16*)scratch.get((block * unit_elements + 2 * TILE * op.num_channels) * sizeof(bf16));
        {
            const TileSession session;
            if (t0 < t1) gemm.run(u0, u1, t0, t1, packed, block, packed + block * unit_elements);
        }
        if (rank == size - 1) dot_features(op, op.num_units() / TILE * TILE, op.num_units());
    });
}

}  // namespace ab
#endif
