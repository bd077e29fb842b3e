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
        uint16_t *keys = a->keys + base + offset % GROUP * 2;
        uint16_t *values = a->values + base + offset % GROUP / 2 * 2 * a->padded_dim + offset % 2;
        for (int64_t i = 0; i < a->padded_dim; i += 16) {
            int64_t from = head * a->head_dim + i, count = a->head_dim - i;
            uint16_t key[16], value[16];
            to_bf16(key, load_first(k + from, count));
            to_bf16(value, load_first(v + from, count));
            for (int64_t pair = 0; pair < 8; pair++) memcpy(keys + (i / 2 + pair) * 2 * GROUP, key + 2 * pair, 4);
            for (int64_t j = 0; j < 16; j++) values[2 * (i + j)] = value[j];
        }
    }
}

constexpr int64_t ROW = SPAN + GROUP;        // scores of one row: the last group may write past its keys
constexpr int64_t WIDE = 4;                  // groups, or sixteens of a head, that are computed side by side
constexpr int64_t HALF_ROWS = MAX_ROWS / 2;  // rows whose WIDE sums each fit the registers

// scores[r][run * g ...] = q_r . k for the 16 keys of each of `count` groups.
template <int R>
static void score(const Query *queries, const uint16_t *const *keys, int64_t count, int64_t run, int64_t padded_dim,
                  float *scores) {
    const uint16_t *group[WIDE];  // where there are fewer, the last one again
    for (int64_t g = 0; g < WIDE; g++) group[g] = keys[g < count ? g : count - 1];
    Floats sums[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int64_t g = 0; g < WIDE; g++) sums[r][g] = splat(0.0f);
    for (int64_t d = 0; d < padded_dim; d += 2)
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const uint32_t pair = word(queries[r].q + d);
#pragma GCC unroll 4
            for (int64_t g = 0; g < WIDE; g++) sums[r][g] = dot_pairs(sums[r][g], pair, load_pairs(group[g] + d * GROUP));
        }
    for (int r = 0; r < R; r++)
        for (int64_t g = 0; g < count; g++) save(scores + r * ROW + g * run, sums[r][g]);
}

// weighted[r] = weighted[r] * shrink[r] + sum over keys of weights[r][key] * values[key], `count` keys in pairs. What
// stands beside the last of an odd number may be anything.
template <int R>
static void weigh(const uint16_t *weights, const uint16_t *const *values, int64_t count, const float *shrink,
                  int64_t padded_dim, float *weighted) {
    for (int64_t d = 0; d < padded_dim; d += 16 * WIDE) {
        int64_t at[WIDE];  // where there are fewer sixteens left, the last one again
        for (int64_t w = 0; w < WIDE; w++) at[w] = d + 16 * w < padded_dim ? d + 16 * w : padded_dim - 16;
        Floats sums[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int64_t w = 0; w < WIDE; w++)
                sums[r][w] = load(weighted + r * padded_dim + at[w]) * splat(shrink[r]);
        for (int64_t key = 0; key < count; key += 2) {
            const Ints there = splat(key + 1 < count ? -1 : 0xFFFF);
            Ints pairs[WIDE];
#pragma GCC unroll 4
            for (int64_t w = 0; w < WIDE; w++) pairs[w] = load_pairs(values[key / 2] + 2 * at[w]) & there;
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const uint32_t two = word(weights + r * SPAN + key);
#pragma GCC unroll 4
                for (int64_t w = 0; w < WIDE; w++) sums[r][w] = dot_pairs(sums[r][w], two, pairs[w]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int64_t w = 0; w < WIDE; w++) save(weighted + r * padded_dim + at[w], sums[r][w]);
    }
}

// Scores of SPAN keys from `start` on become weights, in bf16: 0 for what the row does not see. Moves the row's
// maximum and sum on; returns by how much what was summed before shrinks.
static float soften(const Attention *a, int64_t position, int64_t start, float *scores, uint16_t *weights,
                    float *largest_so_far, float *total) {
    const Ints newest = splat((int32_t)position), oldest = splat((int32_t)(a->window ? position - a->window + 1 : 0));
    const bool all_seen = start + SPAN <= position + 1 && !a->window;
    Floats top = splat(*largest_so_far), summed = splat(0.0f);
    for (int64_t i = 0; i < SPAN; i += 16) {
        Floats s = load(scores + i) * splat(a->scale);
        if (a->softcap != 0.0f) s = splat(a->softcap) * tanh(s / splat(a->softcap));
        if (!all_seen) {
            Ints key = lane() + splat((int32_t)(start + i));
            Ints hidden = (newest < key) | ((key < oldest) & (splat((int32_t)a->sink_tokens - 1) < key));
            s = select(hidden, splat(-INFINITY), s);
        }
        save(scores + i, s);
        top = max(top, s);
    }
    const float new_largest = largest(top);
    for (int64_t i = 0; i < SPAN; i += 16) {
        Floats weight = exp(load(scores + i) - splat(new_largest));
        to_bf16(weights + i, weight);
        summed = summed + weight;
    }
    const float shrink = *largest_so_far == new_largest ? 1.0f : exp_of(*largest_so_far - new_largest);
    *largest_so_far = new_largest;
    *total = *total * shrink + sum(summed);
    return shrink;
}

// Fetch a group of keys and its values while the span before it is computed: blocks lie where they happen to be, so the
// machine cannot guess the next one. It took 15 to 20 % off the attention of 8 and 32 sequences at position 1,024.
INLINE void prefetch_group(const Attention *a, int64_t base) {
    for (int64_t i = 0; i < GROUP * a->padded_dim; i += 32) {
        __builtin_prefetch(a->keys + base + i, 0, 2);
        __builtin_prefetch(a->values + base + i, 0, 2);
    }
}

typedef void (*Score)(const Query *, const uint16_t *const *, int64_t, int64_t, int64_t, float *);
typedef void (*Weigh)(const uint16_t *, const uint16_t *const *, int64_t, const float *, int64_t, float *);

// The softmax of `rows` query rows, positions ascending, over keys [begin, end) of the sequence with this block table.
// begin is a multiple of SPLIT; end is one too, or no row stands behind it. Blocks hold 2, 4, 8 or 16 n slots.
static void attend(const Attention *a, const int64_t *table, const Query *queries, int64_t rows, int64_t kv_head,
                   int64_t begin, int64_t end, Softmax *softmax) {
    static const Score score_rows[HALF_ROWS] = HALF_HEIGHTS(score);
    static const Weigh weigh_rows[HALF_ROWS] = HALF_HEIGHTS(weigh);
    const int64_t dim = a->padded_dim, first_seen = a->window ? queries[0].position - a->window + 1 : 0;
    const int64_t run = a->block_size < GROUP ? a->block_size : GROUP;  // keys side by side in a group
    float scores[TILE_ROWS * ROW], shrink[TILE_ROWS];
    uint16_t weights[TILE_ROWS * SPAN];
    const uint16_t *keys[SPAN / 2], *values[ROW / 2];  // of each group and of each pair
    for (int64_t r = 0; r < rows; r++) softmax->largest[r] = EMPTY, softmax->total[r] = 0.0f;
    memset(softmax->weighted, 0, rows * dim * sizeof(float));
    for (int64_t start = begin; start < end; start += SPAN) {
        if (start + SPAN <= first_seen && start >= a->sink_tokens) continue;  // behind the window of every row
        const int64_t count = end - start < SPAN ? end - start : SPAN, groups = (count + run - 1) / run;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t base = group_at(a, table, kv_head, start + g * run), ahead = start + SPAN + g * run;
            keys[g] = a->keys + base;
            for (int64_t i = 0; i < run; i += 2) values[(g * run + i) / 2] = a->values + base + i * dim;
            if (ahead < end) prefetch_group(a, group_at(a, table, kv_head, ahead));
        }
        for (int64_t r = 0, height; r < rows; r += height) {
            height = rows - r < HALF_ROWS ? rows - r : HALF_ROWS;
            for (int64_t g = 0; g < groups; g += WIDE)
                score_rows[height - 1](queries + r, keys + g, groups - g < WIDE ? groups - g : WIDE, run, dim,
                                       scores + r * ROW + g * run);
        }
        for (int64_t r = 0; r < rows; r++)
            shrink[r] = soften(a, queries[r].position, start, scores + r * ROW, weights + r * SPAN,
                               softmax->largest + r, softmax->total + r);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = rows - r < HALF_ROWS ? rows - r : HALF_ROWS;
            weigh_rows[height - 1](weights + r * SPAN, values, count, shrink + r, dim, softmax->weighted + r * dim);
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
