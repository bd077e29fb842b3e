// What happens to one row at a time: embedding, norm, rotary positions, the encoding that products read, the choice.
#pragma once
#include "vectors.h"

// out = row * scale. row: [width] bf16.
static void embed(const uint16_t *row, int64_t width, float scale, float *out) {
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = (uint32_t)row[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        out[i] = value * scale;
    }
}

// x += y * scale.
static void add_scaled(float *x, const float *y, float scale, int64_t width) {
    for (int64_t i = 0; i < width; i++) x[i] += y[i] * scale;
}

// x / rms(x) * weight, or (x - mean) / deviation * weight + bias. `out` may be `x`.
static void normalize(const Norm *norm, const float *x, int64_t width, float *out) {
    float mean = 0.0f;
    if (norm->kind == LAYER_NORM) {
        Floats total = splat(0.0f);
        for (int64_t i = 0; i < width; i += 16) total = total + load_first(x + i, width - i);
        mean = sum(total) / (float)width;
    }
    Floats squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += 16) {
        Floats d = load_first(x + i, width - i) - splat(mean);
        if (width - i < 16) d = select(lane() < splat((int32_t)(width - i)), d, splat(0.0f));
        squares = squares + d * d;
    }
    Floats inverse = splat(1.0f / sqrtf(sum(squares) / (float)width + norm->eps));
    for (int64_t i = 0; i < width; i += 16) {
        Floats y = (load_first(x + i, width - i) - splat(mean)) * inverse * load_first(norm->weight + i, width - i);
        if (norm->bias) y = y + load_first(norm->bias + i, width - i);
        save_first(out + i, y, width - i);
    }
}

INLINE Ints magnitudes(Floats x) { return as_ints(x) & splat(0x7FFFFFFF); }  // ordered as they are, NaN above all
INLINE float at_least(float floor, float x) { return x < floor ? floor : x; }
// To the nearest integer, ties to even, of what is below 2^22: adding 1.5 * 2^23 leaves it in the low bits.
INLINE Ints round(Floats x) { return as_ints(x + splat(12582912.0f)) - splat(0x4B400000); }

// max |x| / levels; NaN for a row that holds NaN or infinity, so that everything computed from it says so.
static float scale_of(const float *x, int64_t width, float levels) {
    Ints top = splat(0);
    for (int64_t i = 0; i < width; i += 16) top = max(top, magnitudes(load_first(x + i, width - i)));
    const int32_t bits = largest(top);
    return bits >= 0x7F800000 ? NAN : at_least(1e-12f, as_float(bits)) / levels;
}

// One row to u8 = round(x / scale) + 128 with scale = max |x| / 127; what pads the row to `stride` stands for zero.
static void encode_int8(const float *x, int64_t width, uint8_t *out, int64_t stride, float *scale) {
    *scale = scale_of(x, width, 127.0f);
    memset(out, 128, stride);
    if (*scale != *scale) return;
    for (int64_t i = 0; i < width; i += 16) {
        const Ints value = round(load_first(x + i, width - i) / splat(*scale)) + splat(128);
        if (width - i >= 16) {
            to_bytes(out + i, value);
        } else {
            uint8_t last[16];
            to_bytes(last, value);
            memcpy(out + i, last, width - i);
        }
    }
}

// One row to bf16; zeros up to `stride` numbers.
static void encode_bf16(const float *x, int64_t width, uint16_t *out, int64_t stride) {
    for (int64_t i = 0; i < stride; i += 16) {
        uint16_t rounded[16];
        to_bf16(rounded, i < width ? load_first(x + i, width - i) : splat(0.0f));
        memcpy(out + i, rounded, 2 * (stride - i < 16 ? stride - i : 16));
    }
}

// Turn the pairs (i, i + half) of a head by the angles whose cosines and sines are given, [half] (Su et al. 2021).
static void rotate(float *head, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i += 16) {
        Floats a = load_first(head + i, half - i), b = load_first(head + half + i, half - i);
        Floats c = load_first(cos + i, half - i), s = load_first(sin + i, half - i);
        save_first(head + i, a * c - b * s, half - i);
        save_first(head + half + i, b * c + a * s, half - i);
    }
}

// softmax(router x): how likely each expert is. router: [num_experts, width]; odds: [num_experts].
static void route(const float *x, const float *router, int64_t width, int64_t num_experts, float *odds) {
    float top = -INFINITY, total = 0.0f;
    for (int64_t e = 0; e < num_experts; e++) {
        Floats products = splat(0.0f);
        for (int64_t i = 0; i < width; i += 16)
            products = products + load_first(x + i, width - i) * load_first(router + e * width + i, width - i);
        odds[e] = sum(products);
        top = top < odds[e] ? odds[e] : top;
    }
    for (int64_t e = 0; e < num_experts; e++) total += odds[e] = exp_of(odds[e] - top);
    for (int64_t e = 0; e < num_experts; e++) odds[e] /= total;
}

// The largest of a row of logits, the first of equals; NaN if there is one among them, as torch's max has it.
static void likeliest(const float *logits, int64_t width, int64_t *index, float *value) {
    Floats best = splat(-INFINITY);
    Ints at = splat(0), nan = splat(0);
    for (int64_t i = 0; i < width; i += 16) {
        Floats x = load_first(logits + i, width - i);
        if (width - i < 16) x = select(lane() < splat((int32_t)(width - i)), x, splat(-INFINITY));
        nan = nan | (splat(0x7F800000) < (as_ints(x) & splat(0x7FFFFFFF)));
        at = select(best < x, lane() + splat((int32_t)i), at);
        best = max(best, x);
    }
    float values[16];
    int32_t places[16];
    save(values, best);
    memcpy(places, &at, 64);
    *value = largest(best);
    *index = width;
    for (int i = 0; i < 16; i++)
        if (values[i] == *value && places[i] < *index) *index = places[i];
    if (largest(nan & splat(1))) *value = NAN;
}
