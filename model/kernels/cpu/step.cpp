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
      team((int)m.num_threads, PHASES_A_LAYER * m.num_layers + OTHER_PHASES) {
    int64_t attended_width = 0, max_experts = 0, max_chosen = 1;
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
        attended_width = larger(attended_width, l.output.in);
        max_dim = larger(max_dim, l.attention.padded_dim);
    }
    const int64_t n = m.max_tokens, places = n * max_chosen;
    const int64_t units = UNITS_A_THREAD * m.num_threads, splits = ceil_div(m.max_positions, SPLIT);
    x = buffer<float>(n * hidden_stride);
    y = buffer<float>(n * hidden_stride);
    hidden = buffer<float>(n * hidden_stride);
    wide = buffer<float>(places * wide_stride);
    expert_out = buffer<float>(max_experts ? places * hidden_stride : 0);
    routing = max_experts ? new Routing(n, max_experts, max_chosen) : nullptr;
    attended = buffer<float>(n * attended_width);
    queries = buffer<uint8_t>(n * q_stride);
    encoded = buffer<uint8_t>(places * row_bytes);
    scales = buffer<float>(places);
    tiles = buffer<Tile>(n);
    // For each unit and split, and behind them two of each thread's own.
    softmaxes = buffer<Softmax>(units * splits);
    partial = buffer<float>((units * splits + 2 * m.num_threads) * TILE_ROWS * max_dim);
}

Step::~Step() {
    team.dismiss();
    delete routing;
    for (float *memory : {x, y, hidden, wide, attended, scales, expert_out, partial}) free(memory);
    for (void *memory : {(void *)queries, (void *)encoded, (void *)tiles, (void *)softmaxes}) free(memory);
}

void Step::run(const Batch &b) {
    batch = b;
    plan_tiles();
    to_score = {hidden, hidden_stride, b.num_samples, b.sample_rows, b.logits};
    team.run(
        [](void *self, Member &me) {
            Step &step = *static_cast<Step *>(self);
            const int64_t num_layers = step.model.num_layers;
            me.share_rows(step.batch.num_tokens, [&](int64_t row) { step.embed(row); });
            for (int64_t i = 0; i < num_layers; i++) step.layer(me, step.model.layers[i]);
            me.share_rows(step.batch.num_tokens, [&](int64_t row) {
                step.enter(row, step.model.layers[num_layers - 1].mlp_post_norm, Norm{});
                const int64_t at = row * step.hidden_stride;
                step.k.normalize(&step.model.norm, step.x + at, step.model.hidden_size, step.hidden + at);
            });
            step.head(me);
            me.share_rows(step.batch.num_samples, [&](int64_t i) {
                const float *logits = step.batch.logits + i * step.model.head.panels * PANEL;
                const int64_t width = step.model.vocab_size;
                step.k.likeliest(logits, width, step.batch.likeliest + i, step.batch.largest + i);
            });
        },
        this);
}

// Logits of any hidden states: [count, head.panels * 32].
void Step::run_head(const float *states, int64_t stride, const int64_t *picked, int64_t count, float *logits) {
    to_score = {states, stride, count, picked, logits};
    team.run(
        [](void *self, Member &me) {
            Step &step = *static_cast<Step *>(self);
            step.head(me);
        },
        this);
}

void Step::head(Member &me) {
    if (!to_score.count) return;
    me.share_rows(to_score.count, [&](int64_t i) {
        encode(model.head, to_score.hidden + (to_score.picked ? to_score.picked[i] : i) * to_score.stride, i);
    });
    const Then then = model.final_cap != 0.0f ? CAP : STORE;
    multiply(me, model.head, {to_score.logits, model.head.panels * PANEL, model.final_cap, then, SILU}, to_score.count);
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

void Step::layer(Member &me, const Layer &l) {
    const int64_t n = batch.num_tokens;
    const bool first = &l == model.layers;
    static const Norm none{};
    const Norm &before = first ? none : (&l - 1)->mlp_post_norm;
    me.share_rows(n, [&](int64_t row) { encode(l.qkv, enter(row, before, l.attention_norm), row); });
    multiply(me, l.qkv, {wide, wide_stride, 0.0f, STORE, l.activation}, n);
    me.share_rows(n, [&](int64_t row) { place(l, row); });
    if (batch.queries) me.share(1, [&](int64_t, int64_t) { keep_queries(l); });
    attend(me, l.attention);
    me.share_rows(n, [&](int64_t row) { encode(l.output, attended + row * l.output.in, row); });
    add_product(me, l.output, l.attention_post_norm);
    if (l.experts.count)
        mixture(me, l);
    else
        mlp(me, l);
}

void Step::mlp(Member &me, const Layer &l) {
    const int64_t n = batch.num_tokens;
    me.share_rows(n, [&](int64_t row) { encode(l.up, enter(row, l.attention_post_norm, l.mlp_norm), row); });
    multiply(me, l.up, {wide, wide_stride, 0.0f, l.gated ? GATE : ACTIVATE, l.activation}, n);
    me.share_rows(n, [&](int64_t row) { encode(l.down, wide + row * wide_stride, row); });
    add_product(me, l.down, l.mlp_post_norm);
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

void Step::encode(const Linear &linear, const float *from, int64_t row) {
    uint8_t *out = encoded + row * linear.stride;
    if (linear.dtype == INT8)
        k.encode_int8(from, linear.in, out, linear.stride, scales + row);
    else
        k.encode_bf16(from, linear.in, (uint16_t *)out, linear.stride / 2);
}

void Step::multiply(Member &me, const Linear &linear, Epilogue epilogue, int64_t num_rows) {
    const Rows rows{encoded, scales, num_rows, linear.stride};
    const auto product = linear.dtype == INT8 ? k.linear_int8 : k.linear_bf16;
    const int64_t pieces = linear.panels / (epilogue.then == GATE ? 2 : 1);
    me.share(pieces, [&](int64_t panel, int64_t after) {
        // The last pieces are those of different threads: each fetches another panel of the map that comes next.
        product(&linear, &rows, panel, &epilogue, after < pieces ? after : pieces + panel % team.size);
    });
}

// Onto the residual stream at once, or, where a norm comes first, to where `enter` finds it.
void Step::add_product(Member &me, const Linear &linear, const Norm &after) {
    const bool direct = after.kind == NO_NORM;
    multiply(me, linear, {direct ? x : y, hidden_stride, 0.0f, direct ? ADD : STORE, SILU}, batch.num_tokens);
}
