// Products of encoded rows with packed weights: one panel of 32 output channels for all rows of the step.
//
// int8: integer sums are exact, so a row's result depends neither on the rows beside it nor on the machine. bf16: one
// fp32 sum for each output, taken in the order of the inputs, so it does not depend on the rows beside it either.
#pragma once
#include "vectors.h"

INLINE void prefetch(const char *next, int64_t offset) { __builtin_prefetch(next + offset, 0, 2); }

// [R][32] results of one panel into `out`. next: the panel that this thread computes afterwards, fetched meanwhile.
template <int R>
static void tile_int8(const Linear *linear, const Rows *rows, int64_t first, int64_t panel, float *out,
                      const char *next) {
    const int8_t *w = (const int8_t *)linear->weight + panel * PANEL * linear->stride;
    const uint8_t *x = rows->data + first * rows->stride;
    Ints sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = splat(0);
    for (int64_t k = 0; k < linear->stride; k += 16) {
        if (next)
            for (int line = 0; line < 8; line++) prefetch(next, k * PANEL + 64 * line);
#pragma GCC unroll 4
        for (int64_t quad = k; quad < k + 16; quad += 4)
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                uint32_t four = word(x + r * rows->stride + quad);
                sums[r][0] = dot_bytes(sums[r][0], four, w + quad * PANEL);
                sums[r][1] = dot_bytes(sums[r][1], four, w + quad * PANEL + 64);
            }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            int64_t c = panel * PANEL + 16 * half;
            Floats y = to_floats(without_offset(sums[r][half], linear->correction + c));
            y = y * splat(rows->scale[first + r]) * load(linear->scale + c);
            if (linear->bias) y = y + load(linear->bias + c);
            save(out + r * PANEL + 16 * half, y);
        }
}

template <int R>
static void tile_bf16(const Linear *linear, const Rows *rows, int64_t first, int64_t panel, float *out,
                      const char *next) {
    const uint16_t *w = (const uint16_t *)linear->weight + panel * PANEL * linear->stride / 2;
    const uint8_t *x = rows->data + first * rows->stride;
    Floats sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = splat(0.0f);
    for (int64_t k = 0; k < linear->stride; k += 16) {
        if (next)
            for (int line = 0; line < 8; line++) prefetch(next, k * PANEL + 64 * line);
#pragma GCC unroll 4
        for (int64_t pair = k; pair < k + 16; pair += 4)
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                uint32_t two = word(x + r * rows->stride + pair);
                sums[r][0] = dot_pairs(sums[r][0], two, load_pairs(w + pair * PANEL / 2));
                sums[r][1] = dot_pairs(sums[r][1], two, load_pairs(w + pair * PANEL / 2 + 32));
            }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            Floats y = sums[r][half];
            if (linear->bias) y = y + load(linear->bias + panel * PANEL + 16 * half);
            save(out + r * PANEL + 16 * half, y);
        }
}

INLINE Floats activate(Floats x, Activation activation) {
    Floats one = splat(1.0f), half = splat(0.5f), zero = splat(0.0f);
    if (activation == SILU) return x / (one + exp(zero - x));
    if (activation == RELU) return select(x < zero, zero, x);
    if (activation == GELU_TANH) {
        Floats inner = splat(0.79788456f) * (x + splat(0.044715f) * x * x * x);
        return half * x * (one + tanh(inner));
    }
    // erf by Abramowitz and Stegun 7.1.26, within 1.5e-7.
    Floats z = x * splat(0.70710678f), size = max(z, zero - z);
    Floats t = one / (one + splat(0.3275911f) * size);
    Floats p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    Floats erf = one - p * t * exp(zero - size * size);
    return half * x * (one + select(z < zero, zero - erf, erf));
}

// Put R rows of one panel (for GATE: of a pair) where they belong. tile: [R][32], of a pair [2][MAX_ROWS][32].
static void finish_tile(const Epilogue *epilogue, const float *tile, int64_t first, int64_t rows, int64_t panel) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < PANEL; c += 16) {
            float *out = epilogue->out + (first + r) * epilogue->stride + panel * PANEL + c;
            Floats y = load(tile + r * PANEL + c);
            if (epilogue->then == ADD) y = load(out) + y;
            if (epilogue->then == ACTIVATE) y = activate(y, epilogue->activation);
            if (epilogue->then == GATE) y = activate(y, epilogue->activation) * load(tile + (MAX_ROWS + r) * PANEL + c);
            if (epilogue->then == CAP) y = splat(epilogue->cap) * tanh(y / splat(epilogue->cap));
            save(out, y);
        }
}

typedef void (*Tile)(const Linear *, const Rows *, int64_t first, int64_t panel, float *out, const char *next);

// Panel `panel` (for GATE: the pair 2 * panel, 2 * panel + 1) of all rows, in tiles of equal height. next_panel: what
// this thread reads afterwards; behind the last panel stands the next map's first, since maps lie in order of use.
static void run_panel(const Tile *tiles, const Linear *linear, const Rows *rows, int64_t panel,
                      const Epilogue *epilogue, int64_t next_panel) {
    const int64_t pair = epilogue->then == GATE ? 2 : 1, bytes = PANEL * linear->stride;
    const int64_t num_tiles = (rows->count + MAX_ROWS - 1) / MAX_ROWS;
    float tile[2 * MAX_ROWS * PANEL];
    for (int64_t t = 0; t < num_tiles; t++) {
        const int64_t first = rows->count * t / num_tiles, height = rows->count * (t + 1) / num_tiles - first;
        for (int64_t part = 0; part < pair; part++) {
            const char *ahead = (const char *)linear->weight + (next_panel * pair + part) * bytes;
            const char *next = t == 0 ? ahead : nullptr;
            tiles[height - 1](linear, rows, first, pair * panel + part, tile + part * MAX_ROWS * PANEL, next);
        }
        finish_tile(epilogue, tile, first, height, panel);
    }
}

static void linear_int8(const Linear *l, const Rows *rows, int64_t panel, const Epilogue *e, int64_t next_panel) {
    static const Tile tiles[MAX_ROWS] = HEIGHTS(tile_int8);
    run_panel(tiles, l, rows, panel, e, next_panel);
}

static void linear_bf16(const Linear *l, const Rows *rows, int64_t panel, const Epilogue *e, int64_t next_panel) {
    static const Tile tiles[MAX_ROWS] = HEIGHTS(tile_bf16);
    run_panel(tiles, l, rows, panel, e, next_panel);
}
