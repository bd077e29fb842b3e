// Paged causal attention of a tile of query rows, by the online softmax (Milakov and Gimelshein 2018).
//
// Keys are taken in spans of 64 counted from the start of the sequence, and softmaxes start afresh every 256. Both are
// fixed, and a key that a row does not see adds exactly nothing to it, so a row's bits depend neither on the tile it
// stands in nor on how the work was split. What unused slots hold, NaN included, is masked before it is used.
#pragma once
#include "vectors.h"

INLINE int64_t group_at(const Attention *a, const int64_t *table, int64_t kv_head, int64_t position) {
    int64_t block = table[position / a->block_size], group = position % a->block_size / GROUP;
    return ((block * a->num_kv_heads + kv_head) * a->groups + group) * GROUP * a->padded_dim;
}

// Write one token's keys and values, each [num_kv_heads, head_dim], into slot `offset` of a block.
static void store(const Attention *a, int64_t block, int64_t offset, const float *k, const float *v) {
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        int64_t base = ((block * a->num_kv_heads + head) * a->groups + offset / GROUP) * GROUP * a->padded_dim;
        uint16_t *keys = a->keys + base + offset % GROUP * 2, *values = a->values + base + offset % GROUP * a->padded_dim;
        for (int64_t i = 0; i < a->padded_dim; i += 16) {
            int64_t from = head * a->head_dim + i, count = a->head_dim - i;
            uint16_t key[16];
            to_bf16(key, load_first(k + from, count));
            to_bf16(values + i, load_first(v + from, count));
            for (int64_t pair = 0; pair < 8; pair++) memcpy(keys + (i / 2 + pair) * 2 * GROUP, key + 2 * pair, 4);
        }
    }
}

constexpr int64_t ROW = SPAN + GROUP;  // scores of one row: the last group may write past its keys

// scores[r][0..16) = q_r . k for the 16 keys of a group.
template <int R>
static void score(const Query *queries, const uint16_t *keys, int64_t padded_dim, float *scores) {
    Floats sums[R];
    for (int r = 0; r < R; r++) sums[r] = splat(0.0f);
    for (int64_t d = 0; d < padded_dim; d += 8)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int64_t pair = d; pair < d + 8; pair += 2)
                sums[r] = dot_pairs(sums[r], word(queries[r].q + pair), keys + pair * GROUP);
    for (int r = 0; r < R; r++) save(scores + r * ROW, sums[r]);
}

// weighted[r] = weighted[r] * shrink[r] + sum over keys of weights[r][key] * values[key].
template <int R>
static void weigh(const float *weights, const uint16_t *const *values, int64_t count, const float *shrink,
                  int64_t padded_dim, float *weighted) {
    for (int64_t d = 0; d < padded_dim; d += 32) {
        const int64_t second = d + 16 < padded_dim ? 16 : 0;  // an odd number of sixteens: the last one twice
        Floats sums[R][2];
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++)
                sums[r][half] = load(weighted + r * padded_dim + d + half * second) * splat(shrink[r]);
        for (int64_t key = 0; key < count; key++) {
            Floats low = from_bf16(values[key] + d), high = from_bf16(values[key] + d + second);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                Floats weight = splat(weights[r * ROW + key]);
                sums[r][0] = fma(weight, low, sums[r][0]);
                sums[r][1] = fma(weight, high, sums[r][1]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++) save(weighted + r * padded_dim + d + half * second, sums[r][half]);
    }
}

// Scores of SPAN keys from `start` on become weights, in place: 0 for what the row does not see. Moves the row's maximum
// and sum on; returns by how much what was summed before shrinks.
static float soften(const Attention *a, int64_t position, int64_t start, float *scores, float *largest_so_far,
                    float *total) {
    const Ints newest = splat((int32_t)position), oldest = splat((int32_t)(a->window ? position - a->window + 1 : 0));
    Floats top = splat(*largest_so_far), summed = splat(0.0f);
    for (int64_t i = 0; i < SPAN; i += 16) {
        Ints key = lane() + splat((int32_t)(start + i));
        Ints hidden = (newest < key) | ((key < oldest) & (splat((int32_t)a->sink_tokens - 1) < key));
        Floats s = load(scores + i) * splat(a->scale);
        if (a->softcap != 0.0f) s = splat(a->softcap) * tanh(s / splat(a->softcap));
        s = select(hidden, splat(-INFINITY), s);
        save(scores + i, s);
        top = max(top, s);
    }
    const float new_largest = largest(top);
    for (int64_t i = 0; i < SPAN; i += 16) {
        Floats weight = exp(load(scores + i) - splat(new_largest));
        save(scores + i, weight);
        summed = summed + weight;
    }
    const float shrink = exp_of(*largest_so_far - new_largest);
    *largest_so_far = new_largest;
    *total = *total * shrink + sum(summed);
    return shrink;
}

typedef void (*Score)(const Query *, const uint16_t *, int64_t, float *);
typedef void (*Weigh)(const float *, const uint16_t *const *, int64_t, const float *, int64_t, float *);

// The softmax of `rows` query rows, positions ascending, over keys [begin, end) of the sequence with this block table.
// begin is a multiple of SPLIT; end is one too, or no row stands behind it. Blocks hold 1, 2, 4, 8 or 16 n slots.
static void attend(const Attention *a, const int64_t *table, const Query *queries, int64_t rows, int64_t kv_head,
                   int64_t begin, int64_t end, Softmax *softmax) {
    static const Score score_rows[MAX_ROWS] = HEIGHTS(score);
    static const Weigh weigh_rows[MAX_ROWS] = HEIGHTS(weigh);
    const int64_t dim = a->padded_dim, first_seen = a->window ? queries[0].position - a->window + 1 : 0;
    const int64_t run = a->block_size < GROUP ? a->block_size : GROUP;  // keys side by side in a group
    float scores[TILE_ROWS * ROW], shrink[TILE_ROWS];
    const uint16_t *values[ROW];
    for (int64_t r = 0; r < rows; r++) softmax->largest[r] = EMPTY, softmax->total[r] = 0.0f;
    memset(softmax->weighted, 0, rows * dim * sizeof(float));
    for (int64_t start = begin; start < end; start += SPAN) {
        if (start + SPAN <= first_seen && start >= a->sink_tokens) continue;  // behind the window of every row
        const int64_t count = end - start < SPAN ? end - start : SPAN;
        for (int64_t key = 0; key < count; key += run) {
            const int64_t base = group_at(a, table, kv_head, start + key);
            for (int64_t i = 0; i < run; i++) values[key + i] = a->values + base + i * dim;
            for (int64_t r = 0, height; r < rows; r += height) {
                height = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
                score_rows[height - 1](queries + r, a->keys + base, dim, scores + r * ROW + key);
            }
        }
        for (int64_t r = 0; r < rows; r++)
            shrink[r] = soften(a, queries[r].position, start, scores + r * ROW, softmax->largest + r, softmax->total + r);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            weigh_rows[height - 1](scores + r * ROW, values, count, shrink + r, dim, softmax->weighted + r * dim);
        }
    }
}

// Take the softmax over later keys into that over earlier ones, row by row.
static void merge(Softmax *softmax, const Softmax *later, int64_t rows, int64_t padded_dim) {
    for (int64_t r = 0; r < rows; r++) {
        const float top = softmax->largest[r] < later->largest[r] ? later->largest[r] : softmax->largest[r];
        const float shrink = exp_of(softmax->largest[r] - top), grow = exp_of(later->largest[r] - top);
        softmax->largest[r] = top;
        softmax->total[r] = softmax->total[r] * shrink + later->total[r] * grow;
        for (int64_t i = r * padded_dim; i < (r + 1) * padded_dim; i += 16)
            save(softmax->weighted + i,
                 load(softmax->weighted + i) * splat(shrink) + load(later->weighted + i) * splat(grow));
    }
}

// Row r of a softmax over all keys as the output of query head `head`, [head_dim].
static void finish(const Attention *a, const Softmax *softmax, int64_t r, int64_t head, float *out) {
    float total = softmax->total[r], shrink = 1.0f;
    if (a->sinks) {
        const float top = softmax->largest[r] < a->sinks[head] ? a->sinks[head] : softmax->largest[r];
        shrink = exp_of(softmax->largest[r] - top);
        total = total * shrink + exp_of(a->sinks[head] - top);
    }
    for (int64_t i = 0; i < a->head_dim; i += 16) {
        Floats y = load(softmax->weighted + r * a->padded_dim + i) * splat(shrink) / splat(total);
        save_first(out + i, y, a->head_dim - i);
    }
}
