// The C ABI of the CPU kernels. Strides are in elements, pointers are of contiguous last axes.
#include "elementwise.h"
#include "decode.h"
#include "gemm.h"
#include "linear.h"
#include "prefill_tiles.h"
#include "prefill_wide.h"
#include "program.h"
#include "wide.h"

using ab::bf16;

namespace {

// Rows of x up to which this build's own product beats a library's GEMM; measured at each level but AVX-512's float32.
template <class E>
long max_linear_rows(long channels) {
#if defined(AB_TILES)
    if (sizeof(E) == 2 && channels % ab::TILE_K == 0)
        return ab::amx_allowed() ? ab::MAX_BLOCKED_ROWS : ab::MAX_STREAMED_ROWS;
#elif !defined(__AVX512F__)
    return std::numeric_limits<long>::max();
#endif
    return ab::MAX_DOT_ROWS;
}

template <class E>
void run_linear(const ab::Linear<E>& op, int threads) {
#if defined(AB_TILES)
    if constexpr (sizeof(E) == 2)
        if (op.num_rows > ab::MAX_DOT_ROWS && ab::tiles_fit(op))
            return op.num_rows <= ab::MAX_STREAMED_ROWS ? ab::linear_streamed(op, threads)
                                                        : ab::linear_blocked(op, threads);
#elif !defined(__AVX512F__)
    if (op.num_rows > ab::MAX_DOT_ROWS) return ab::linear_wide(op, threads);
#endif
    ab::linear_dot(op, threads);
}

// Attention of sequences with many new tokens: 0, or 1, having done nothing, where this build leaves it to a library.
template <class E>
int run_attention_long(const ab::Attention<E>& op, int threads) {
#if defined(AB_TILES)
    if constexpr (sizeof(E) == 2)
        if (op.head_dim % ab::TILE_K == 0) {
            ab::attention_long<ab::PrefillByTiles>(op, threads);
            return 0;
        }
    return 1;
#elif defined(__AVX512F__)
    return 1;
#else
    ab::attention_long<ab::PrefillWide<E>>(op, threads);
    return 0;
#endif
}

// The fields of Attention that a batch, a layer or a model fixes; laid out as in native.py.
struct AttentionShape {
    int64_t q_stride_t, q_stride_h, table_width, num_sequences, num_heads, num_kv_heads, head_dim, block_size, window,
        max_short, whole;
    float scale;
};

template <class E>
ab::Attention<E> attention_of(const E* q, const E* k, const E* v, const int32_t* tables, const int32_t* starts,
                              const int32_t* lens, E* out, float* lse, const AttentionShape& s) {
    return {q, s.q_stride_t, s.q_stride_h, k, v, tables, s.table_width, starts, lens, s.num_sequences, s.num_heads,
            s.num_kv_heads, s.head_dim, s.block_size, s.scale, s.window, s.max_short, s.whole != 0, out, lse};
}

}  // namespace

#define AB_API extern "C" __attribute__((visibility("default")))

#define AB_OPS(E, suffix)                                                                                            \
    AB_API void ab_rms_norm_##suffix(const E* x, const E* weight, E* out, long stride_t, long stride_h, long num_t,   \
                                     long num_h, long n, float eps, int threads) {                                   \
        ab::rms_norm(x, stride_t, stride_h, weight, out, num_t, num_h, n, eps, threads);                             \
    }                                                                                                                \
    AB_API void ab_add_rms_norm_##suffix(const E* a, const E* b, const E* weight, E* total, E* out, long rows, long n, \
                                         float eps, int threads) {                                                   \
        ab::add_rms_norm(a, b, weight, total, out, rows, n, eps, threads);                                           \
    }                                                                                                                \
    AB_API void ab_silu_mul_##suffix(const E* gate_up, E* out, long stride, long rows, long n, int threads) {         \
        ab::silu_mul(gate_up, stride, out, rows, n, threads);                                                        \
    }                                                                                                                \
    AB_API void ab_rotary_##suffix(const E* x, const float* cos, const float* sin, E* out, long stride_t,             \
                                   long stride_h, long num_t, long num_h, long d, long turned, int threads) {        \
        ab::rotary(x, stride_t, stride_h, cos, sin, out, num_t, num_h, d, turned, threads);                          \
    }                                                                                                                \
    AB_API void ab_linear_##suffix(const E* x, const E* weight, const E* bias, E* out, long x_stride,                 \
                                   long out_stride, long rows, long features, long channels, int gated,              \
                                   int threads) {                                                                    \
        run_linear<E>({x, x_stride, weight, bias, out, out_stride, rows, features, channels, gated != 0}, threads);  \
    }                                                                                                                \
    AB_API void ab_attention_short_##suffix(const E* q, const E* k, const E* v, const int32_t* tables,                \
                                            const int32_t* starts, const int32_t* lens, E* out, float* lse,          \
                                            const AttentionShape* shape, int threads) {                              \
        ab::attention_short(attention_of(q, k, v, tables, starts, lens, out, lse, *shape), threads);                 \
    }                                                                                                                \
    AB_API int ab_attention_long_##suffix(const E* q, const E* k, const E* v, const int32_t* tables,                  \
                                          const int32_t* starts, const int32_t* lens, E* out, float* lse,            \
                                          const AttentionShape* shape, int threads) {                                \
        return run_attention_long(attention_of(q, k, v, tables, starts, lens, out, lse, *shape), threads);           \
    }                                                                                                                \
    AB_API void ab_argmax_##suffix(const E* x, int64_t* out, long stride, long rows, long n, int threads) {           \
        ab::argmax(x, stride, out, rows, n, threads);                                                                \
    }                                                                                                                \
    AB_API long ab_max_linear_rows_##suffix(long channels) { return max_linear_rows<E>(channels); }

AB_OPS(float, float32)
AB_OPS(bf16, bfloat16)

AB_API void ab_store_kv(const char* k, const char* v, char* k_pool, char* v_pool, const int64_t* slots, long k_stride_t,
                        long k_stride_h, long v_stride_t, long v_stride_h, long num_t, long num_h, long row_bytes,
                        int threads) {
    ab::store_kv(k, v, k_stride_t, k_stride_h, v_stride_t, v_stride_h, k_pool, v_pool, slots, num_t, num_h, row_bytes,
                 threads);
}

AB_API void ab_export_kv(const char* k, const char* v, char* out, const int64_t* rows, long first_row, long num_rows,
                         long k_stride_t, long v_stride_t, long row_bytes, int threads) {
    ab::export_kv(k, v, out, rows, first_row, num_rows, k_stride_t, v_stride_t, row_bytes, threads);
}

AB_API void ab_import_kv(const char* kv, char* pool, const int64_t* slots, long num_planes, long plane_bytes,
                         long slot_bytes, long num_t, long row_bytes) {
    ab::import_kv(kv, pool, slots, num_planes, plane_bytes, slot_bytes, num_t, row_bytes);
}

#define AB_ENTRY(name) {#name, ab::Unpacked<name>::call}
#define AB_ENTRIES(suffix)                                                                                           \
    AB_ENTRY(ab_rms_norm_##suffix), AB_ENTRY(ab_add_rms_norm_##suffix), AB_ENTRY(ab_silu_mul_##suffix),               \
        AB_ENTRY(ab_rotary_##suffix), AB_ENTRY(ab_linear_##suffix), AB_ENTRY(ab_attention_short_##suffix)

// What a program calls instead of the function of that name; null where there is none.
AB_API void* ab_find_op(const char* name) {
    static const struct {
        const char* name;
        int (*call)(const int64_t*);
    } entries[] = {AB_ENTRIES(float32), AB_ENTRIES(bfloat16), AB_ENTRY(ab_store_kv),
                   {"reduce", ab::Unpacked<ab::call_reduce>::call}};
    for (const auto& entry : entries)
        if (!strcmp(entry.name, name)) return (void*)entry.call;
    return nullptr;
}

AB_API int ab_run_program(const ab::Op* ops, long count, int threads, long* place) {
    return ab::run_program(ops, count, threads, place);
}

// Rows from which on a product's rows do not depend on each other nor on their number; 0: they may.
AB_API int ab_exact_from() {
#if defined(AB_TILES) || defined(__AVX512F__)
    return 0;
#else
    return ab::MAX_DOT_ROWS + 1;
#endif
}

// What the build uses: 4 AMX, 3 AVX-512 BF16, 2 AVX-512, 1 AVX2, 0 what the compiler makes of it.
AB_API int ab_level() {
#if defined(AB_TILES)
    return ab::amx_allowed() ? 4 : 3;
#elif defined(__AVX512F__)
    return 2;
#elif defined(__AVX2__) && defined(__FMA__)
    return 1;
#else
    return 0;
#endif
}
