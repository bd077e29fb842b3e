// A step from the embedding to the logits. What the phases compute is in the kernels.
#include "step.h"

#include <stdlib.h>

// Memory that holds anything; what is never used of a large piece takes none of the machine's.
template <class T>
T *Step::buffer(int64_t count) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T) + 64)) complete = false;
    return static_cast<T *>(memory);
}

Step::Step(const Model &m, const Kernels &kernels)
    : model(m), hidden_stride(m.layers[0].output.panels * PANEL), k(kernels), cache(kernels.cache[m.cache_dtype]),
      max_parts(larger(m.num_threads, ceil_div(m.max_tokens, MAX_ROWS_A_PART) + m.num_threads)),
      team((int)m.num_threads, (int)max_parts, PHASES_A_LAYER * m.num_layers + OTHER_PHASES) {
    int64_t max_experts = 0, max_chosen = 1;
    row_bytes = m.head.stride;
    for (int64_t i = 0; i < m.num_layers; i++) {
        const Layer &l = m.layers[i];
        const Linear &up = l.experts.count ? l.experts.up[0] : l.up;
        const Linear &down = l.experts.count ? l.experts.down[0] : l.down;
        for (const Linear *linear : {&l.qkv, &l.output, &up, &down}) row_bytes = larger(row_bytes, linear->stride);
        wide_stride = larger(wide_stride, larger(l.qkv.panels, up.panels) * PANEL);
        max_experts = larger(max_experts, l.experts.count);
        max_chosen = larger(max_chosen, l.experts.num_chosen);
        q_bytes = larger(q_bytes, cache.query_bytes(l.attention.padded_dim));
        q_stride = larger(q_stride, l.attention.num_heads * q_bytes);
        attended_stride = larger(attended_stride, l.output.in);
        max_dim = larger(max_dim, l.attention.padded_dim);
    }
    const int64_t n = m.max_tokens, places = n * max_chosen, units = UNITS_A_THREAD * m.num_threads;
    max_splits = ceil_div(m.max_positions, SPLIT);
    x = buffer<float>(n * hidden_stride);
    y = buffer<float>(n * hidden_stride);
    hidden = buffer<float>(n * hidden_stride);
    wide = buffer<float>(places * wide_stride);
    expert_out = buffer<float>(max_experts ? places * hidden_stride : 0);
    routing = max_experts ? new Routing(n, max_experts, max_chosen) : nullptr;
    attended = buffer<float>(n * attended_stride);
    queries = buffer<uint8_t>(n * q_stride);
    encoded = buffer<uint8_t>(places * row_bytes);
    scales = buffer<float>(places);
    tiles = buffer<Tile>(n);
    parts = new Part[max_parts]{};
    // For each unit and split, and behind them two of each thread's own.
    softmaxes = buffer<Softmax>(units * max_splits);
    partial = buffer<float>((units * max_splits + 2 * m.num_threads) * TILE_ROWS * max_dim);
}

Step::~Step() {
    team.dismiss();
    delete routing;
    delete[] parts;
    for (float *memory : {x, y, hidden, wide, attended, scales, expert_out, partial}) free(memory);
    for (void *memory : {(void *)queries, (void *)encoded, (void *)tiles, (void *)softmaxes}) free(memory);
}

void Step::run(const Batch &b) {
    batch = b;
    to_score = {hidden, hidden_stride, b.sample_rows, b.logits};
    plan_parts();
    team.run(
        (int)num_parts,
        [](void *self, Member &me) {
            Step &step = *static_cast<Step *>(self);
            // Everybody takes parts of their own, then helps with those of others.
            const int64_t count = step.num_parts, threads = step.model.num_threads, crew = larger(1, threads / count);
            const auto go_through = [&](const Part &part) {
                me.enter(part.lane, crew);
                step.compute(me, part);
            };
            const int64_t turns = larger(count, threads);
            for (int64_t i = me.begin_one_of(turns); i != Member::NOTHING; i = me.begin_one_of(turns))
                go_through(step.parts[i % count]);
            for (int64_t i = 0; i < count; i++) go_through(step.parts[i]);
        },
        this);
}

// Logits of any hidden states: [count, head.panels * 32].
void Step::run_head(const float *states, int64_t stride, const int64_t *picked, int64_t count, float *logits) {
    to_score = {states, stride, picked, logits};
    parts[0] = {};
    parts[0].samples = {0, count};
    team.run(
        1,
        [](void *self, Member &me) {
            Step &step = *static_cast<Step *>(self);
            me.enter(0, step.model.num_threads);
            step.head(me, step.parts[0]);
        },
        this);
}

// Of a small step as many parts as its rows are worth, each with as many threads; of a large one as many as keep a part's
// rows in a core's cache. Experts are chosen for all rows together.
void Step::plan_parts() {
    const int64_t n = batch.num_tokens, threads = model.num_threads;
    int64_t count = threads;
    while (count > 1 && (threads % count || n < ROWS_A_PART * count * count)) count--;
    if (n > MAX_ROWS_A_PART * threads) count = ceil_div(ceil_div(n, MAX_ROWS_A_PART), threads) * threads;
    if (routing) count = 1;
    int64_t seq = 0, sample = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = n * i / count, end = n * (i + 1) / count, first_sample = sample;
        while (batch.query_start_loc[seq + 1] <= first) seq++;
        while (sample < batch.num_samples && batch.sample_rows[sample] < end) sample++;
        Part &part = parts[i];
        part.rows = {first, end - first};
        part.samples = {first_sample, sample - first_sample};
        part.lane = i;
        part.follows = batch.query_start_loc[seq] < first;
        plan_tiles(part, seq);
    }
    num_parts = count;
}

void Step::compute(Member &me, const Part &part) {
    me.share_rows(part.rows, [&](int64_t row) { embed(row); });
    for (int64_t i = 0; i < model.num_layers; i++) layer(me, part, model.layers[i]);
    me.share_rows(part.rows, [&](int64_t row) {
        enter(row, model.layers[model.num_layers - 1].mlp_post_norm, Norm{});
        k.normalize(&model.norm, x + row * hidden_stride, model.hidden_size, hidden + row * hidden_stride);
    });
    head(me, part);
    me.share_rows(part.samples, [&](int64_t i) {
        const float *logits = batch.logits + i * model.head.panels * PANEL;
        k.likeliest(logits, model.vocab_size, batch.likeliest + i, batch.largest + i);
    });
}

void Step::head(Member &me, const Part &part) {
    const Range samples = part.samples;
    if (!samples.count) return;
    me.share_rows(samples, [&](int64_t i) {
        const float *from = to_score.hidden + (to_score.picked ? to_score.picked[i] : i) * to_score.stride;
        encode(part, model.head, from, i - samples.first);
    });
    const int64_t stride = model.head.panels * PANEL;
    const Then then = model.final_cap != 0.0f ? CAP : STORE;
    float *out = to_score.logits + samples.first * stride;
    multiply(me, part, model.head, {out, stride, model.final_cap, then, SILU}, samples.count);
}

void Step::embed(int64_t row) {
    const int64_t width = model.hidden_size;
    k.embed(model.embedding + batch.token_ids[row] * width, width, model.embedding_scale, x + row * hidden_stride);
    if (model.position_embedding) {
        float *place = y + row * hidden_stride;
        k.embed(model.position_embedding + batch.positions[row] * width, width, 1.0f, place);
        k.add_scaled(x + row * hidden_stride, place, 1.0f, width);
    }
}

void Step::layer(Member &me, const Part &part, const Layer &l) {
    const Range rows = part.rows;
    const bool first = &l == model.layers;
    static const Norm none{};
    const Norm &before = first ? none : (&l - 1)->mlp_post_norm;
    me.share_rows(rows, [&](int64_t row) {
        encode(part, l.qkv, enter(row, before, l.attention_norm), row - rows.first);
    });
    float *out = wide + rows.first * wide_stride;
    multiply(me, part, l.qkv, {out, wide_stride, 0.0f, STORE, l.activation}, rows.count);
    me.share_rows(rows, [&](int64_t row) { place(l, row); });
    for (const Part *own = &part; own->follows; own--) me.wait_for_lane(own->lane - 1);
    if (batch.queries) me.share(1, [&](int64_t, int64_t) { keep_queries(part, l); });
    attend(me, part, l.attention);
    me.share_rows(rows, [&](int64_t row) {
        encode(part, l.output, attended + row * attended_stride, row - rows.first);
    });
    add_product(me, part, l.output, l.attention_post_norm);
    if (l.experts.count)
        mixture(me, part, l);
    else
        mlp(me, part, l);
}

void Step::mlp(Member &me, const Part &part, const Layer &l) {
    const Range rows = part.rows;
    me.share_rows(rows, [&](int64_t row) {
        encode(part, l.up, enter(row, l.attention_post_norm, l.mlp_norm), row - rows.first);
    });
    float *out = wide + rows.first * wide_stride;
    multiply(me, part, l.up, {out, wide_stride, 0.0f, l.gated ? GATE : ACTIVATE, l.activation}, rows.count);
    me.share_rows(rows, [&](int64_t row) { encode(part, l.down, wide + row * wide_stride, row - rows.first); });
    add_product(me, part, l.down, l.mlp_post_norm);
}

// Close the sub-block before (its norm, if it has one, then the residual sum), and open the next: its input.
const float *Step::enter(int64_t row, const Norm &after, const Norm &before) {
    float *stream = x + row * hidden_stride, *scratch = y + row * hidden_stride;
    if (after.kind != NO_NORM) {
        k.normalize(&after, scratch, model.hidden_size, scratch);
        k.add_scaled(stream, scratch, 1.0f, model.hidden_size);
    }
    if (before.kind == NO_NORM) return stream;
    k.normalize(&before, stream, model.hidden_size, scratch);
    return scratch;
}

// The part's row `index`, for a product. Maps have strides of their own, and parts are at different maps at a time: each
// part has room for rows of the widest.
void Step::encode(const Part &part, const Linear &linear, const float *from, int64_t index) {
    uint8_t *out = encoded + part.rows.first * row_bytes + index * linear.stride;
    if (linear.dtype == INT8)
        k.encode_int8(from, linear.in, out, linear.stride, scales + part.rows.first + index);
    else
        k.encode_bf16(from, linear.in, (uint16_t *)out, linear.stride / 2);
}

void Step::multiply(Member &me, const Part &part, const Linear &linear, Epilogue epilogue, int64_t num_rows) {
    const int64_t first = part.rows.first, pieces = linear.panels / (epilogue.then == GATE ? 2 : 1);
    const Rows rows{encoded + first * row_bytes, scales + first, num_rows, linear.stride};
    const auto product = linear.dtype == INT8 ? k.linear_int8 : k.linear_bf16;
    me.share(pieces, [&](int64_t panel, int64_t after) {
        // The last pieces are those of different threads: each fetches another panel of the map that comes next.
        product(&linear, &rows, panel, &epilogue, after < pieces ? after : pieces + panel % me.crew);
    });
}

// Onto the residual stream at once, or, where a norm comes first, to where `enter` finds it.
void Step::add_product(Member &me, const Part &part, const Linear &linear, const Norm &after) {
    const bool direct = after.kind == NO_NORM;
    float *out = (direct ? x : y) + part.rows.first * hidden_stride;
    multiply(me, part, linear, {out, hidden_stride, 0.0f, direct ? ADD : STORE, SILU}, part.rows.count);
}
