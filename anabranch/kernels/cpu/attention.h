// What both attention kernels are given.
#pragma once

#include <cstdint>

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
    bool whole;      // every query sees all of its sequence's context; no window
    E* out;          // [T, H, D]
    float* lse;      // [T, H]

    long group() const { return num_heads / num_kv_heads; }
    long num_new(long b) const { return starts[b + 1] - starts[b]; }
    // Elements that a token's heads take in a pool.
    long row() const { return num_kv_heads * head_dim; }

    // Calls f(i, offset of token from + i in the pools) for i in [0, count).
    template <class F>
    void each_token(long b, long from, long count, const F& f) const {
        const int32_t* block = tables + b * table_width + from / block_size;
        long within = from % block_size;
        for (long i = 0; i < count; i++) {
            f(i, (*block * block_size + within) * row());
            if (++within == block_size) {
                within = 0;
                block++;
            }
        }
    }
};

}  // namespace ab
