// Products with a row-major weight matrix by tiles: weight rows are the left operand as they lie in memory.
#pragma once

#include <algorithm>

#include "dot.h"
#include "tile.h"

#if defined(AB_TILES)
namespace ab {

// Up to this many rows the weights' way from memory is the bound: each is read once, in far-apart streams.
constexpr long MAX_STREAMED_ROWS = 96;

struct TiledLinear {
    const Linear<bf16>& op;
    const bf16* panels;  // packed x: [ceil(T / 16)][C / 32][PANEL_STEP]
    long panel_elements;

    const bf16* weight(long f) const { return op.weight + f * op.num_channels; }

    // c: [16 features][16 tokens] of row stride ldc.
    void rows_of(const float* c, long ldc, f32 rows[16]) const {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(c + i * ldc);
        transpose16(r);
        for (int i = 0; i < 16; i++) rows[i] = (f32)r[i];
    }

    void put(long f, long panel, const float* c, long ldc) const {
        f32 rows[16];
        rows_of(c, ldc, rows);
        const f32 bias = op.bias ? load(op.bias + f) : f32{};
        const long t0 = panel * TILE, count = std::min<long>(TILE, op.num_rows - t0);
        for (long i = 0; i < count; i++) store(op.out + (t0 + i) * op.out_stride + f, rows[i] + bias);
    }

    void put_gated(long f, long panel, const float* gate, const float* up, long ldc) const {
        f32 g[16], u[16];
        rows_of(gate, ldc, g);
        rows_of(up, ldc, u);
        const f32 g_bias = op.bias ? load(op.bias + f) : f32{};
        const f32 u_bias = op.bias ? load(op.bias + f + op.num_features / 2) : f32{};
        const long t0 = panel * TILE, count = std::min<long>(TILE, op.num_rows - t0);
        for (long i = 0; i < count; i++) {
            const f32 gated = rounded(silu(rounded(g[i] + g_bias, op.x)), op.x);
            store(op.out + (t0 + i) * op.out_stride + f, gated * rounded(u[i] + u_bias, op.x));
        }
    }

    // A product whose result is still to be written: tiles' stores are slow to come back, so that one product is
    // written while the next is computed.
    struct Pending {
        alignas(64) float buffers[2][4 * TILE * TILE];
        float* c = nullptr;
        long f[2], panel;
        int num_features, num_panels;
    };

    void write(const Pending& done) const {
        const long ldc = done.num_panels * TILE;
        for (int n = 0; n < done.num_panels; n++) {
            const float* c = done.c + n * TILE;
            if (op.gated) {
                put_gated(done.f[0], done.panel + n, c, c + TILE * ldc, ldc);
                continue;
            }
            for (int m = 0; m < done.num_features; m++) put(done.f[m], done.panel + n, c + m * TILE * ldc, ldc);
        }
    }

    template <int MT, int NT>
    void product(const long* f, long panel, const Ahead& ahead, Pending& last) const {
        float* c = last.buffers[last.c == last.buffers[0]];
        const bf16 *a[2], *b[2];
        for (int m = 0; m < MT; m++) a[m] = weight(f[m]);
        for (int n = 0; n < NT; n++) b[n] = panels + (panel + n) * panel_elements;
        tile_gemm<MT, NT>(a, op.num_channels, b, op.num_channels / TILE_K, c, NT * TILE, false, ahead);
        if (last.c) write(last);
        last.c = c;
        last.panel = panel;
        last.num_features = MT;
        last.num_panels = NT;
        for (int m = 0; m < MT; m++) last.f[m] = f[m];
    }

    // The 16 features at f[0] (and f[1], where MT is 2) of all rows.
    template <int MT>
    void features(const long* f, long num_panels, Pending& last) const {
        const long passes = ceil_div(num_panels, 2);
        for (long pass = 0; pass < passes; pass++) {
            // The next rows of each stream, once, a part of them in each pass.
            const Ahead ahead{TILE * op.num_channels, TILE * pass / passes, TILE * (pass + 1) / passes};
            if (2 * pass + 2 <= num_panels)
                product<MT, 2>(f, 2 * pass, ahead, last);
            else
                product<MT, 1>(f, 2 * pass, ahead, last);
        }
    }

    // Tile units [from, to) of 16 output features, as two far-apart streams.
    void units(long from, long to, long num_panels) const {
        Pending last;
        if (op.gated) {
            for (long u = from; u < to; u++) {
                const long f[2] = {u * TILE, u * TILE + op.num_features / 2};
                features<2>(f, num_panels, last);
            }
        } else {
            const long pairs = (to - from) / 2;
            for (long i = from; i < from + pairs; i++) {
                const long f[2] = {i * TILE, (i + pairs) * TILE};
                features<2>(f, num_panels, last);
            }
            if ((to - from) % 2) {
                const long f[1] = {(to - 1) * TILE};
                features<1>(f, num_panels, last);
            }
        }
        if (last.c) write(last);
    }
};

inline bool tiles_fit(const Linear<bf16>& op) {
    return op.num_channels % TILE_K == 0 && op.num_units() >= TILE && !(op.gated && op.num_units() % TILE);
}

// Few rows: x is packed, weight rows are the left operand.
inline void linear_streamed(const Linear<bf16>& op, int threads) {
    static thread_local Scratch scratch;
    const long num_panels = ceil_div(op.num_rows, TILE), steps = op.num_channels / TILE_K;
    const long panel_elements = steps * PANEL_STEP;
    bf16* panels = (bf16*)scratch.get(num_panels * panel_elements * sizeof(bf16));
    const TiledLinear tiled{op, panels, panel_elements};
    const long units = op.num_units() / TILE, tail = units * TILE;
    parallel(threads, op.num_features * op.num_channels, [&](int rank, int size) {
        const long packs = num_panels * steps;
        for (long i = packs * rank / size; i < packs * (rank + 1) / size; i++) {
            const long panel = i / steps, step = i % steps, t = panel * TILE;
            pack_step(op.x + t * op.x_stride + step * TILE_K, op.x_stride, std::min<long>(TILE, op.num_rows - t),
                      panels + panel * panel_elements + step * PANEL_STEP);
        }
        if (size > 1) {
#pragma omp barrier
        }
        {
            const TileSession session;
            tiled.units(units * rank / size, units * (rank + 1) / size, num_panels);
        }
        if (rank == size - 1) dot_features(op, tail, op.num_units());
    });
}

}  // namespace ab
#endif
