// Keys and values in int8, four numbers side by side: what `vpdpbusd` multiplies and sums.
//
// A group of 16 tokens: scales bf16 [2][16], of keys and of values; keys [padded_dim / 4][16][4]; values
// [4][padded_dim][4]. The scale of a key or value is max |x| / 127, rounded to bf16; of one that holds NaN or infinity,
// NaN. Queries and weights are of 14 bits, in two bytes of 7, so that all rounding that matters is that of the cache.
// Sums over a head and over a span of keys are integers, hence exact: in any order, on any machine.
#pragma once
#include "rows.h"

struct Int8Cache {
    static constexpr int64_t SIDE = 4, BYTES = 1, HEADER = 64, ROWS = HALF_ROWS > 1 ? HALF_ROWS / 2 : 1;
    struct Sum { Ints high, low; };
    struct Few { uint32_t high, low; };  // four numbers of a query or four weights

    // What a query begins with; then [padded_dim / 4][high, low][4]. The value is (128 high + low) * scale.
    struct QueryHead {
        float scale;
        int32_t high, low, unused;  // sums of all bytes
    };
    static int64_t query_bytes(int64_t padded_dim) { return sizeof(QueryHead) + 2 * padded_dim; }

    static void encode_query(const float *q, int64_t width, uint8_t *out, int64_t padded_dim) {
        QueryHead head{scale_of(q, width, 127 * 128), 0, 0, 0};
        if (head.scale != head.scale) {
            memset(out, 0, query_bytes(padded_dim));
            memcpy(out, &head, sizeof head);
            return;
        }
        Ints highs = splat(0), lows = splat(0);
        for (int64_t i = 0; i < padded_dim; i += 16) {
            const Ints value = round(load_first(q + i, width - i) / splat(head.scale));
            const Ints high = shift_right(value + splat(64), 7), low = value - shift_left(high, 7);
            highs = highs + high, lows = lows + low;
            uint8_t bytes[2][16];
            to_bytes(bytes[0], high);
            to_bytes(bytes[1], low);
            for (int64_t j = 0; j < 16; j += 4) {
                memcpy(out + sizeof head + 2 * (i + j), bytes[0] + j, 4);
                memcpy(out + sizeof head + 2 * (i + j) + 4, bytes[1] + j, 4);
            }
        }
        head.high = sum(highs), head.low = sum(lows);
        memcpy(out, &head, sizeof head);
    }

    // One head's key and value, [count], into place `lane` of its group.
    static void store(uint8_t *group, int64_t lane, int64_t padded_dim, const float *k, const float *v, int64_t count) {
        const float key_scale = store_scale(group + 2 * lane, k, count);
        const float value_scale = store_scale(group + 2 * (GROUP + lane), v, count);
        uint8_t *keys = group + HEADER + 4 * lane;
        uint8_t *values = group + HEADER + GROUP * padded_dim + lane / 4 * 4 * padded_dim + lane % 4;
        for (int64_t i = 0; i < padded_dim; i += 16) {
            uint8_t key[16], value[16];
            to_bytes(key, round(load_first(k + i, count - i) / splat(key_scale)));
            to_bytes(value, round(load_first(v + i, count - i) / splat(value_scale)));
            for (int64_t j = 0; j < 16; j += 4) memcpy(keys + (i + j) * GROUP, key + j, 4);
            for (int64_t j = 0; j < 16; j++) values[4 * (i + j)] = value[j];
        }
    }

    INLINE Sum no_score(const uint8_t *q) {
        const QueryHead head = head_of(q);
        return {splat(signed_offset(head.high)), splat(signed_offset(head.low))};
    }
    INLINE Few of_query(const uint8_t *q, int64_t d) {
        return {word(q + sizeof(QueryHead) + 2 * d), word(q + sizeof(QueryHead) + 2 * d + 4)};
    }
    INLINE Sum add_key(Sum sum, Few q, Ints keys) {
        return {dot_signed(sum.high, q.high, keys), dot_signed(sum.low, q.low, keys)};
    }
    INLINE Floats score(Sum sum, const uint8_t *q, const uint8_t *group) {
        return joined(sum) * splat(head_of(q).scale) * from_bf16((const uint16_t *)group);
    }

    struct Span {
        float value_scale[SPAN + GROUP];
        Span(const uint8_t *const *groups, int64_t count, int64_t run) {
            for (int64_t g = 0; g < count; g++)
                save(value_scale + g * run, from_bf16((const uint16_t *)groups[g] + GROUP));
        }
    };
    // Each weight takes in its value's scale; the largest of the span becomes 2^14 - 1. Returns what 1 then stands for.
    INLINE float encode_weights(const float *weights, const Span &span, uint8_t *out) {
        Floats scaled[SPAN / 16];
        Ints top = splat(0);
        for (int64_t i = 0; i < SPAN / 16; i++) {
            const Floats weight = load(weights + 16 * i), zero = splat(0.0f);
            // The scale of a key that is not seen may be anything.
            scaled[i] = select(zero < weight, weight * load(span.value_scale + 16 * i), zero);
            top = max(top, magnitudes(scaled[i]));
        }
        const float unit = at_least(1e-30f, as_float(largest(top))) / 16383.0f;
        for (int64_t i = 0; i < SPAN / 16; i++) {
            const Ints value = round(scaled[i] * splat(1.0f / unit));
            to_bytes(out + 16 * i, shift_right(value, 7));
            to_bytes(out + SPAN + 16 * i, value & splat(127));
        }
        return unit;
    }
    INLINE Few of_weights(const uint8_t *weights, int64_t key) {
        return {word(weights + key), word(weights + SPAN + key)};
    }
    INLINE Ints seen(Ints values, int64_t) { return values; }  // the weights of all others are zero
    INLINE Sum no_value(Floats) { return {splat(0), splat(0)}; }
    INLINE Sum add_value(Sum sum, Few weights, Ints values) {
        return {dot_positive(sum.high, weights.high, values), dot_positive(sum.low, weights.low, values)};
    }
    INLINE Floats weighted(Sum sum, Floats before, float unit) { return before + joined(sum) * splat(unit); }

  private:
    INLINE QueryHead head_of(const uint8_t *q) {
        QueryHead head;
        memcpy(&head, q, sizeof head);
        return head;
    }
    INLINE Floats joined(Sum sum) { return to_floats(sum.high) * splat(128.0f) + to_floats(sum.low); }

    INLINE float store_scale(uint8_t *place, const float *x, int64_t count) {
        uint16_t rounded[16];
        to_bf16(rounded, splat(scale_of(x, count, 127)));
        memcpy(place, rounded, 2);
        return as_float(rounded[0] << 16);
    }
};
