// The part of a step between a layer's first product and its second: place queries, keys and values, then attend.
#include "step.h"

// Norm and turn a row's queries and keys, store its keys and values, encode its queries.
void Step::place(const Layer &l, int64_t row) {
    const Attention &a = l.attention;
    const int64_t dim = a.head_dim, position = batch.positions[row], num_turned = a.num_heads + a.num_kv_heads;
    float *q = wide + row * wide_stride, *key = q + a.num_heads * dim;
    if (l.norm_whole) {
        k.normalize(&l.q_norm, q, a.num_heads * dim, q);
        k.normalize(&l.k_norm, key, a.num_kv_heads * dim, key);
    }
    for (int64_t head = 0; head < num_turned; head++) {
        const Norm &norm = head < a.num_heads ? l.q_norm : l.k_norm;
        if (norm.kind != NO_NORM && !l.norm_whole) k.normalize(&norm, q + head * dim, dim, q + head * dim);
        if (l.rotary_half)
            k.rotate(q + head * dim, l.cos + position * l.rotary_half, l.sin + position * l.rotary_half, l.rotary_half);
    }
    for (int64_t head = 0; head < a.num_heads; head++)
        cache.encode_query(q + head * dim, dim, queries + row * q_stride + head * q_bytes, a.padded_dim);
    int64_t seq = 0;  // the last sequence that starts at or before the row
    for (int64_t high = batch.num_seqs; high - seq > 1;) {
        const int64_t middle = (seq + high) / 2;
        if (batch.query_start_loc[middle] <= row)
            seq = middle;
        else
            high = middle;
    }
    const int64_t block = batch.block_tables[seq * batch.max_blocks + position / a.block_size];
    cache.store(&a, block, position % a.block_size, key, key + a.num_kv_heads * dim);
}

void Step::keep_queries(const Part &part, const Layer &l) {
    const Attention &a = l.attention;
    const int64_t first = part.samples.first, sample = (&l - model.layers) * batch.num_samples + first;
    uint16_t *kept = batch.queries + sample * a.num_heads * a.padded_dim;
    for (int64_t i = first; i < first + part.samples.count; i++)
        for (int64_t head = 0; head < a.num_heads; head++, kept += a.padded_dim) {
            const float *q = wide + batch.sample_rows[i] * wide_stride + head * a.head_dim;
            k.encode_bf16(q, a.head_dim, kept, a.padded_dim);
        }
}

// seq: of the part's first row. There are no more tiles than rows: a part's tiles stand where its rows do.
void Step::plan_tiles(Part &part, int64_t seq) {
    const Attention &a = model.layers[0].attention;
    const int64_t group_size = a.num_heads / a.num_kv_heads, tokens = larger(1, TILE_ROWS / group_size);
    const int64_t end = part.rows.first + part.rows.count;
    int64_t longest = 0;
    part.num_tiles = 0;
    for (int64_t row = part.rows.first; row < end; seq++) {
        const int64_t its_end = batch.query_start_loc[seq + 1], last = its_end < end ? its_end : end;
        for (; row < last; row += tokens)
            tiles[part.rows.first + part.num_tiles++] = {seq, row, last - row < tokens ? last - row : tokens};
        row = last;
        longest = larger(longest, batch.positions[last - 1] + 1);
    }
    part.num_units = part.num_tiles * a.num_kv_heads * ceil_div(group_size, TILE_ROWS);
    part.num_splits = ceil_div(longest, SPLIT);
}

Step::Unit Step::unit_at(const Part &part, const Attention &a, int64_t unit) const {
    const int64_t group_size = a.num_heads / a.num_kv_heads, chunks = ceil_div(group_size, TILE_ROWS);
    const int64_t kv_head = unit / chunks % a.num_kv_heads, from = unit % chunks * TILE_ROWS;
    // The last tiles of a long prompt have the most to do: they are taken first.
    const Tile &tile = tiles[part.rows.first + part.num_tiles - 1 - unit / chunks / a.num_kv_heads];
    const int64_t num_heads = group_size - from < TILE_ROWS ? group_size - from : TILE_ROWS;
    const int64_t last = tile.first + tile.tokens - 1;
    return {&tile, kv_head, kv_head * group_size + from, num_heads, tile.tokens * num_heads, batch.positions[last] + 1};
}

void Step::attend(Member &me, const Part &part, const Attention &a) {
    const int64_t size = TILE_ROWS * max_dim, units = part.num_units, splits = part.num_splits;
    if (units < UNITS_A_THREAD * me.crew && splits > 1) {
        const int64_t first = UNITS_A_THREAD * me.crew * max_splits * part.lane;  // of the part's own memory
        me.share(units * splits, [&](int64_t i, int64_t) {
            float *weighted = partial + (first + i) * size;
            softmaxes[first + i] = attend_split(part, a, i / splits, i % splits, weighted);
        });
        me.share(units, [&](int64_t unit, int64_t) {
            Softmax *all = softmaxes + first + unit * splits;
            const int64_t num_rows = unit_at(part, a, unit).num_rows;
            for (int64_t split = 1; split < splits; split++) k.merge(all, all + split, num_rows, a.padded_dim);
            finish(part, a, unit, *all);
        });
        return;
    }
    me.skip();  // the second phase of those above
    float *own = partial + (UNITS_A_THREAD * model.num_threads * max_splits + 2 * me.index) * size;
    me.share(units, [&](int64_t unit, int64_t) {
        const Unit its = unit_at(part, a, unit);
        Softmax all = attend_split(part, a, unit, 0, own);
        for (int64_t split = 1; split * SPLIT < its.end; split++) {
            const Softmax later = attend_split(part, a, unit, split, own + size);
            k.merge(&all, &later, its.num_rows, a.padded_dim);
        }
        finish(part, a, unit, all);
    });
}

Softmax Step::attend_split(const Part &part, const Attention &a, int64_t index, int64_t split, float *weighted) {
    const Unit unit = unit_at(part, a, index);
    const int64_t stop = (split + 1) * SPLIT;
    Query q[TILE_ROWS];
    for (int64_t r = 0; r < unit.num_rows; r++) {
        const int64_t row = unit.tile->first + r / unit.num_heads, head = unit.first_head + r % unit.num_heads;
        q[r] = {queries + row * q_stride + head * q_bytes, batch.positions[row]};
    }
    Softmax softmax{{}, {}, weighted};
    const int64_t *table = batch.block_tables + unit.tile->seq * batch.max_blocks;
    cache.attend(&a, table, q, unit.num_rows, unit.kv_head, split * SPLIT, unit.end < stop ? unit.end : stop, &softmax);
    return softmax;
}

void Step::finish(const Part &part, const Attention &a, int64_t index, const Softmax &softmax) {
    const Unit unit = unit_at(part, a, index);
    for (int64_t r = 0; r < unit.num_rows; r++) {
        const int64_t row = unit.tile->first + r / unit.num_heads, head = unit.first_head + r % unit.num_heads;
        k.finish(&a, &softmax, r, head, attended + row * attended_stride + head * a.head_dim);
    }
}
