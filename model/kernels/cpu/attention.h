// Paged causal attention of a tile of query rows, by the online softmax (Milakov and Gimelshein 2018).
//
// Keys are taken in spans of 64 counted from the start of the sequence, and softmaxes start afresh every 256. Both are
// fixed, and a key that a row does not see adds exactly nothing to it, so a row's bits depend neither on the tile it
// stands in nor on how the work was split. What unused slots hold, NaN included, is masked before it is used.
#pragma once
#include "cache_bf16.h"
#include "cache_int8.h"

constexpr int64_t ROW = SPAN + GROUP;  // scores of one row: the last group may write past its keys
constexpr int64_t WIDE = 4;            // groups, or sixteens of a head, that are computed side by side
constexpr int64_t WEIGHTS = 2 * SPAN;  // bytes of a row's weights over a span, encoded

INLINE uint8_t *group_at(const Attention *a, int64_t block, int64_t kv_head, int64_t offset) {
    return a->cache + ((block * a->num_kv_heads + kv_head) * a->groups + offset / GROUP) * a->group_bytes;
}
INLINE const uint8_t *group_of(const Attention *a, const int64_t *table, int64_t kv_head, int64_t position) {
    return group_at(a, table[position / a->block_size], kv_head, position % a->block_size);
}

// Into the second-level cache. Blocks lie where they happen to be, so the machine cannot guess the next one; and all
// lines of a span asked for at once would hold up what computes the span before it.
INLINE void fetch(const uint8_t *line) { __builtin_prefetch(line, 0, 2); }

// Write one token's keys and values, each [num_kv_heads, head_dim], into slot `offset` of a block.
template <class Cache>
static void store(const Attention *a, int64_t block, int64_t offset, const float *k, const float *v) {
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const int64_t from = head * a->head_dim;
        Cache::store(group_at(a, block, head, offset), offset % GROUP, a->padded_dim, k + from, v + from, a->head_dim);
    }
}

// scores[r][run * g ...] = q_r . k for the 16 keys of each of `count` groups. next: the groups to fetch meanwhile.
template <class Cache, int R>
static void score(const Query *queries, const uint8_t *const *groups, const uint8_t *const *next, int64_t count,
                  int64_t run, int64_t padded_dim, float *scores) {
    const uint8_t *group[WIDE], *ahead[WIDE];  // where there are fewer, the last one again
    for (int64_t g = 0; g < WIDE; g++) {
        group[g] = groups[g < count ? g : count - 1], ahead[g] = next[g < count ? g : count - 1];
        if (Cache::HEADER) fetch(ahead[g]);
    }
    typename Cache::Sum sums[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int64_t g = 0; g < WIDE; g++) sums[r][g] = Cache::no_score(queries[r].q);
    for (int64_t d = 0; d < padded_dim; d += Cache::SIDE) {
        const int64_t at = Cache::HEADER + d * GROUP * Cache::BYTES;
#pragma GCC unroll 4
        for (int64_t g = 0; g < WIDE; g++) fetch(ahead[g] + at);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const auto few = Cache::of_query(queries[r].q, d);
#pragma GCC unroll 4
            for (int64_t g = 0; g < WIDE; g++) sums[r][g] = Cache::add_key(sums[r][g], few, load_bits(group[g] + at));
        }
    }
    for (int r = 0; r < R; r++)
        for (int64_t g = 0; g < count; g++)
            save(scores + r * ROW + g * run, Cache::score(sums[r][g], queries[r].q, group[g]));
}

// weighted[r] = weighted[r] * shrink[r] + sum over keys of weights[r][key] * values[key], `count` keys, of which
// values[i] are those from SIDE * i on, and next[i] what to fetch meanwhile. units: what `encode_weights` returned.
template <class Cache, int R>
static void weigh(const uint8_t *weights, const uint8_t *const *values, const uint8_t *const *next, int64_t count,
                  const float *shrink, const float *units, int64_t padded_dim, float *weighted) {
    for (int64_t d = 0; d < padded_dim; d += 16 * WIDE) {
        int64_t at[WIDE];  // where there are fewer sixteens left, the last one again
        for (int64_t w = 0; w < WIDE; w++) at[w] = d + 16 * w < padded_dim ? d + 16 * w : padded_dim - 16;
        typename Cache::Sum sums[R][WIDE];
        for (int r = 0; r < R; r++)
            for (int64_t w = 0; w < WIDE; w++)
                sums[r][w] = Cache::no_value(load(weighted + r * padded_dim + at[w]) * splat(shrink[r]));
        for (int64_t key = 0; key < count; key += Cache::SIDE) {
            Ints there[WIDE];
#pragma GCC unroll 4
            for (int64_t w = 0; w < WIDE; w++) {
                there[w] = Cache::seen(load_bits(values[key / Cache::SIDE] + 4 * at[w]), count - key);
                fetch(next[key / Cache::SIDE] + 4 * at[w]);
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const auto few = Cache::of_weights(weights + r * WEIGHTS, key);
#pragma GCC unroll 4
                for (int64_t w = 0; w < WIDE; w++) sums[r][w] = Cache::add_value(sums[r][w], few, there[w]);
            }
        }
        Floats results[R][WIDE];  // a sixteen that stands for two is shrunk once
        for (int r = 0; r < R; r++)
            for (int64_t w = 0; w < WIDE; w++) {
                const Floats before = load(weighted + r * padded_dim + at[w]) * splat(shrink[r]);
                results[r][w] = Cache::weighted(sums[r][w], before, units[r]);
            }
        for (int r = 0; r < R; r++)
            for (int64_t w = 0; w < WIDE; w++) save(weighted + r * padded_dim + at[w], results[r][w]);
    }
}

// A kernel for as many rows as there are, at most Cache::ROWS.
template <class Cache, int R = Cache::ROWS, class... Arguments>
INLINE void score_rows(int64_t rows, Arguments... arguments) {
    if (rows == R) return score<Cache, R>(arguments...);
    if constexpr (R > 1) score_rows<Cache, R - 1>(rows, arguments...);
}
template <class Cache, int R = Cache::ROWS, class... Arguments>
INLINE void weigh_rows(int64_t rows, Arguments... arguments) {
    if (rows == R) return weigh<Cache, R>(arguments...);
    if constexpr (R > 1) weigh_rows<Cache, R - 1>(rows, arguments...);
}

// Scores of SPAN keys from `start` on become weights: 0 for what the row does not see. Moves the row's maximum and sum
// on; returns by how much what was summed before shrinks.
static float soften(const Attention *a, int64_t position, int64_t start, float *scores, float *largest_so_far,
                    float *total) {
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
        save(scores + i, weight);
        summed = summed + weight;
    }
    const float shrink = *largest_so_far == new_largest ? 1.0f : exp_of(*largest_so_far - new_largest);
    *largest_so_far = new_largest;
    *total = *total * shrink + sum(summed);
    return shrink;
}

// Where a span lies: its groups, and the values of each SIDE keys.
template <class Cache>
struct Places {
    const uint8_t *groups[SPAN / 2], *values[ROW / 2];

    // `count` groups of `run` keys from `start` on; behind the newest key, its own group again.
    void find(const Attention *a, const int64_t *table, int64_t kv_head, int64_t start, int64_t count, int64_t run,
              int64_t newest) {
        for (int64_t g = 0; g < count; g++) {
            const int64_t key = start + g * run;
            groups[g] = group_of(a, table, kv_head, key < newest ? key : newest);
            const uint8_t *first = groups[g] + Cache::HEADER + GROUP * a->padded_dim * Cache::BYTES;
            for (int64_t i = 0; i < run; i += Cache::SIDE)
                values[(g * run + i) / Cache::SIDE] = first + i * a->padded_dim * Cache::BYTES;
        }
    }
};

// The softmax of `rows` query rows, positions ascending, over keys [begin, end) of the sequence with this block table.
// begin is a multiple of SPLIT; end is one too, or no row stands behind it. Blocks hold 2 (bf16), 4, 8 or 16 n slots.
template <class Cache>
static void attend(const Attention *a, const int64_t *table, const Query *queries, int64_t rows, int64_t kv_head,
                   int64_t begin, int64_t end, Softmax *softmax) {
    const int64_t dim = a->padded_dim, first_seen = a->window ? queries[0].position - a->window + 1 : 0;
    const int64_t newest = queries[rows - 1].position;
    const int64_t run = a->block_size < GROUP ? a->block_size : GROUP;  // keys side by side in a group
    float scores[TILE_ROWS * ROW], shrink[TILE_ROWS], units[TILE_ROWS];
    uint8_t weights[TILE_ROWS * WEIGHTS];
    Places<Cache> here, ahead;
    for (int64_t r = 0; r < rows; r++) softmax->largest[r] = EMPTY, softmax->total[r] = 0.0f;
    memset(softmax->weighted, 0, rows * dim * sizeof(float));
    for (int64_t start = begin; start < end; start += SPAN) {
        if (start + SPAN <= first_seen && start >= a->sink_tokens) continue;  // behind the window of every row
        const int64_t count = end - start < SPAN ? end - start : SPAN, num_groups = (count + run - 1) / run;
        here.find(a, table, kv_head, start, num_groups, run, newest);
        ahead.find(a, table, kv_head, start + SPAN, num_groups, run, newest);
        for (int64_t r = 0, height; r < rows; r += height) {
            height = rows - r < Cache::ROWS ? rows - r : Cache::ROWS;
            for (int64_t g = 0; g < num_groups; g += WIDE)
                score_rows<Cache>(height, queries + r, here.groups + g, (r ? here : ahead).groups + g,
                                  num_groups - g < WIDE ? num_groups - g : WIDE, run, dim, scores + r * ROW + g * run);
        }
        const typename Cache::Span span(here.groups, num_groups, run);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * ROW;
            shrink[r] = soften(a, queries[r].position, start, row, softmax->largest + r, softmax->total + r);
            units[r] = Cache::encode_weights(row, span, weights + r * WEIGHTS);
        }
        for (int64_t r = 0, height; r < rows; r += height) {
            height = rows - r < Cache::ROWS ? rows - r : Cache::ROWS;
            weigh_rows<Cache>(height, weights + r * WEIGHTS, here.values, (r ? here : ahead).values, count, shrink + r,
                              units + r, dim, softmax->weighted + r * dim);
        }
    }
}

template <class Cache>
constexpr CacheKernels kernels_of = {Cache::query_bytes, Cache::encode_query, store<Cache>, attend<Cache>};

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
