// Keys and values in bf16, two numbers side by side: what `vdpbf16ps` multiplies and sums.
//
// A group of 16 tokens: keys [padded_dim / 2][16][2], values [8][padded_dim][2]. A query: [padded_dim]; weights of one
// row: [SPAN], both bf16 too.
#pragma once
#include "rows.h"

struct Bf16Cache {
    static constexpr int64_t SIDE = 2, BYTES = 2, HEADER = 0, ROWS = HALF_ROWS;
    typedef Floats Sum;
    typedef uint32_t Few;  // two numbers of a query or two weights

    static int64_t query_bytes(int64_t padded_dim) { return 2 * padded_dim; }

    static void encode_query(const float *q, int64_t width, uint8_t *out, int64_t padded_dim) {
        encode_bf16(q, width, (uint16_t *)out, padded_dim);
    }

    // One head's key and value, [count], into place `lane` of its group.
    static void store(uint8_t *group, int64_t lane, int64_t padded_dim, const float *k, const float *v, int64_t count) {
        uint16_t *keys = (uint16_t *)group + 2 * lane;
        uint16_t *values = (uint16_t *)group + GROUP * padded_dim + lane / 2 * 2 * padded_dim + lane % 2;
        for (int64_t i = 0; i < padded_dim; i += 16) {
            uint16_t key[16], value[16];
            to_bf16(key, load_first(k + i, count - i));
            to_bf16(value, load_first(v + i, count - i));
            for (int64_t pair = 0; pair < 8; pair++) memcpy(keys + (i / 2 + pair) * 2 * GROUP, key + 2 * pair, 4);
            for (int64_t j = 0; j < 16; j++) values[2 * (i + j)] = value[j];
        }
    }

    INLINE Sum no_score(const uint8_t *) { return splat(0.0f); }
    INLINE Few of_query(const uint8_t *q, int64_t d) { return word(q + 2 * d); }
    INLINE Sum add_key(Sum sum, Few q, Ints keys) { return dot_pairs(sum, q, keys); }
    INLINE Floats score(Sum sum, const uint8_t *, const uint8_t *) { return sum; }

    struct Span {  // nothing to know about its values
        Span(const uint8_t *const *, int64_t, int64_t) {}
    };
    // Returns what a sum of weighted values is to be multiplied with.
    INLINE float encode_weights(const float *weights, const Span &, uint8_t *out) {
        for (int64_t i = 0; i < SPAN; i += 16) to_bf16((uint16_t *)out + i, load(weights + i));
        return 1.0f;
    }
    INLINE Few of_weights(const uint8_t *weights, int64_t key) { return word(weights + 2 * key); }
    // What stands beside the last of an odd number of keys may be anything.
    INLINE Ints seen(Ints values, int64_t keys_left) { return keys_left > 1 ? values : values & splat(0xFFFF); }
    INLINE Sum no_value(Floats before) { return before; }
    INLINE Sum add_value(Sum sum, Few weights, Ints values) { return dot_pairs(sum, weights, values); }
    INLINE Floats weighted(Sum sum, Floats, float) { return sum; }
};
