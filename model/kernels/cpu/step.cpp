// The step: phases that all threads share out, one after another. What they compute is in the kernels.
#include "step.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// The best instruction set of this machine is the last: 0 portable, 1 AVX2, 2 AVX-512 with VNNI and bf16.
EXPORT int32_t native_instruction_sets() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    for (bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                     __builtin_cpu_supports("avx512vl") != 0, __builtin_cpu_supports("avx512dq") != 0,
                     __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0})
        if (!has) return 2;
    return 3;
#else
    return 1;
#endif
}

EXPORT const Kernels *native_kernels(int32_t instruction_set) {
#if defined(__x86_64__)
    if (instruction_set == 2) return &kernels_avx512;
    if (instruction_set == 1) return &kernels_avx2;
#endif
    return instruction_set == 0 ? &kernels_portable : nullptr;
}

static int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeros; large ones come from the system untouched, so what is never used takes no memory.
template <class T>
static T *buffer(int64_t count) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T) + 64)) abort();
    return static_cast<T *>(memory);
}

// Consecutive tokens of one sequence that attend together.
struct Tile {
    int64_t seq, first, tokens;
};

class Step {
  public:
    explicit Step(const Model &model);
    ~Step();
    void run(const Batch &batch);
    void run_head(const float *hidden, int64_t stride, const int64_t *picked, int64_t count, float *logits);

    const Model model;
    const int64_t hidden_stride;
    float *hidden;  // [max_tokens, hidden_stride]: after the final norm

  private:
    void layer(Member &, const Layer &);
    void embed(int64_t row);
    void enter(int64_t row, const Norm &after, const Norm &before, const Linear &next);
    void encode(const Linear &, const float *x, int64_t row);
    void multiply(Member &, const Linear &, Epilogue, int64_t num_rows);
    void add_product(Member &, const Linear &, const Norm &after);
    void place(const Layer &, int64_t row);
    void keep_queries(int64_t layer);
    void plan_tiles();
    void attend(Member &, const Attention &);
    Softmax attend_split(const Attention &, int64_t unit, int64_t split, float *weighted);
    void finish(const Attention &, int64_t unit, const Softmax &);
    void head(Member &);

    struct Unit {  // a tile's queries that share one key/value head
        const Tile *tile;
        int64_t kv_head, first_head, num_heads, num_rows, end;
    };
    Unit unit_at(const Attention &, int64_t unit) const;

    const Kernels &k;
    Team team;
    int64_t wide_stride = 0, row_bytes = 0, q_stride = 0, num_units = 0, num_splits = 0, num_tiles = 0, max_dim = 0;
    float *x, *y, *wide, *attended, *scales, *partial;
    Softmax *softmaxes;
    uint16_t *queries;
    uint8_t *encoded;
    Tile *tiles;
    Batch batch{};
    struct {
        const float *hidden;
        int64_t stride, count;
        const int64_t *picked;
        float *logits;
    } to_score{};
};

constexpr int64_t PHASES_A_LAYER = 11, OTHER_PHASES = 5;
constexpr int64_t UNITS_A_THREAD = 4;  // with fewer, the context of each is split over the threads

Step::Step(const Model &m)
    : model(m), hidden_stride(m.layers[0].output.panels * PANEL), k(*native_kernels(m.instruction_set)),
      team((int)m.num_threads, PHASES_A_LAYER * m.num_layers + OTHER_PHASES) {
    int64_t attended_width = 0;
    row_bytes = m.head.stride;
    for (int64_t i = 0; i < m.num_layers; i++) {
        const Layer &l = m.layers[i];
        for (const Linear *linear : {&l.qkv, &l.output, &l.up, &l.down}) row_bytes = max(row_bytes, linear->stride);
        wide_stride = max(wide_stride, max(l.qkv.panels, l.up.panels) * PANEL);
        q_stride = max(q_stride, l.attention.num_heads * l.attention.padded_dim);
        attended_width = max(attended_width, l.output.in);
        max_dim = max(max_dim, l.attention.padded_dim);
    }
    const int64_t n = m.max_tokens, units = UNITS_A_THREAD * m.num_threads, splits = ceil_div(m.max_positions, SPLIT);
    x = buffer<float>(n * hidden_stride);
    y = buffer<float>(n * hidden_stride);
    hidden = buffer<float>(n * hidden_stride);
    wide = buffer<float>(n * wide_stride);
    attended = buffer<float>(n * attended_width);
    queries = buffer<uint16_t>(n * q_stride);
    encoded = buffer<uint8_t>(n * row_bytes);
    scales = buffer<float>(n);
    tiles = buffer<Tile>(n);
    // For each unit and split, and behind them two of each thread's own.
    softmaxes = buffer<Softmax>(units * splits);
    partial = buffer<float>((units * splits + 2 * m.num_threads) * TILE_ROWS * max_dim);
}

Step::~Step() {
    for (void *memory : {(void *)x, (void *)y, (void *)hidden, (void *)wide, (void *)attended, (void *)queries,
                         (void *)encoded, (void *)scales, (void *)tiles, (void *)softmaxes, (void *)partial})
        free(memory);
}

void Step::run(const Batch &b) {
    batch = b;
    plan_tiles();
    to_score = {hidden, hidden_stride, b.num_samples, b.sample_rows, b.logits};
    team.run(
        [](void *self, int index) {
            Step &step = *static_cast<Step *>(self);
            Member me(step.team, index);
            const int64_t num_layers = step.model.num_layers;
            me.share_rows(step.batch.num_tokens, [&](int64_t row) { step.embed(row); });
            for (int64_t i = 0; i < num_layers; i++) step.layer(me, step.model.layers[i]);
            me.share_rows(step.batch.num_tokens, [&](int64_t row) {
                const int64_t at = row * step.hidden_stride;
                const Norm &after = step.model.layers[num_layers - 1].mlp_post_norm;
                if (after.kind != NO_NORM) {
                    step.k.normalize(&after, step.y + at, step.model.hidden_size, step.y + at);
                    step.k.add(step.x + at, step.y + at, step.model.hidden_size);
                }
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
        [](void *self, int index) {
            Step &step = *static_cast<Step *>(self);
            Member me(step.team, index);
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
        k.add(x + row * hidden_stride, place, width);
    }
}

void Step::layer(Member &me, const Layer &l) {
    const int64_t n = batch.num_tokens;
    const bool first = &l == model.layers;
    static const Norm none{};
    const Norm &before = first ? none : (&l - 1)->mlp_post_norm;
    me.share_rows(n, [&](int64_t row) { enter(row, before, l.attention_norm, l.qkv); });
    multiply(me, l.qkv, {wide, wide_stride, 0.0f, STORE, l.activation}, n);
    me.share_rows(n, [&](int64_t row) { place(l, row); });
    if (batch.queries && me.index == 0) keep_queries(&l - model.layers);
    attend(me, l.attention);
    me.share_rows(n, [&](int64_t row) { encode(l.output, attended + row * l.output.in, row); });
    add_product(me, l.output, l.attention_post_norm);
    me.share_rows(n, [&](int64_t row) { enter(row, l.attention_post_norm, l.mlp_norm, l.up); });
    multiply(me, l.up, {wide, wide_stride, 0.0f, l.gated ? GATE : ACTIVATE, l.activation}, n);
    me.share_rows(n, [&](int64_t row) { encode(l.down, wide + row * wide_stride, row); });
    add_product(me, l.down, l.mlp_post_norm);
}

// Close the sub-block before (its norm, if it has one, then the residual sum), and open the next.
void Step::enter(int64_t row, const Norm &after, const Norm &before, const Linear &next) {
    float *stream = x + row * hidden_stride, *scratch = y + row * hidden_stride;
    if (after.kind != NO_NORM) {
        k.normalize(&after, scratch, model.hidden_size, scratch);
        k.add(stream, scratch, model.hidden_size);
    }
    if (before.kind != NO_NORM) k.normalize(&before, stream, model.hidden_size, scratch);
    encode(next, before.kind != NO_NORM ? scratch : stream, row);
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
    me.share(linear.panels / (epilogue.then == GATE ? 2 : 1),
             [&](int64_t panel, int64_t after) { product(&linear, &rows, panel, &epilogue, after); });
}

// Onto the residual stream at once, or, where a norm comes first, to where `enter` finds it.
void Step::add_product(Member &me, const Linear &linear, const Norm &after) {
    const bool direct = after.kind == NO_NORM;
    multiply(me, linear, {direct ? x : y, hidden_stride, 0.0f, direct ? ADD : STORE, SILU}, batch.num_tokens);
}

// Norm and turn a row's queries and keys, store its keys and values, leave its queries in bf16.
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
        k.encode_bf16(q + head * dim, dim, queries + row * q_stride + head * a.padded_dim, a.padded_dim);
    int64_t seq = 0;  // the last sequence that starts at or before the row
    for (int64_t high = batch.num_seqs; high - seq > 1;) {
        const int64_t middle = (seq + high) / 2;
        if (batch.query_start_loc[middle] <= row)
            seq = middle;
        else
            high = middle;
    }
    const int64_t block = batch.block_tables[seq * batch.max_blocks + position / a.block_size];
    k.store(&a, block, position % a.block_size, key, key + a.num_kv_heads * dim);
}

void Step::keep_queries(int64_t layer) {
    uint16_t *kept = batch.queries + layer * batch.num_samples * q_stride;
    for (int64_t i = 0; i < batch.num_samples; i++)
        memcpy(kept + i * q_stride, queries + batch.sample_rows[i] * q_stride, q_stride * sizeof(uint16_t));
}

void Step::plan_tiles() {
    const Attention &a = model.layers[0].attention;
    const int64_t group_size = a.num_heads / a.num_kv_heads, tokens = max(1, TILE_ROWS / group_size);
    int64_t longest = 0;
    num_tiles = 0;
    for (int64_t seq = 0; seq < batch.num_seqs; seq++) {
        const int64_t last = batch.query_start_loc[seq + 1];
        for (int64_t row = batch.query_start_loc[seq]; row < last; row += tokens)
            tiles[num_tiles++] = {seq, row, last - row < tokens ? last - row : tokens};
        longest = max(longest, batch.positions[last - 1] + 1);
    }
    num_units = num_tiles * a.num_kv_heads * ceil_div(group_size, TILE_ROWS);
    num_splits = ceil_div(longest, SPLIT);
}

Step::Unit Step::unit_at(const Attention &a, int64_t unit) const {
    const int64_t group_size = a.num_heads / a.num_kv_heads, chunks = ceil_div(group_size, TILE_ROWS);
    const int64_t kv_head = unit / chunks % a.num_kv_heads, from = unit % chunks * TILE_ROWS;
    // The last tiles of a long prompt have the most to do: they are taken first.
    const Tile &tile = tiles[num_tiles - 1 - unit / chunks / a.num_kv_heads];
    const int64_t num_heads = group_size - from < TILE_ROWS ? group_size - from : TILE_ROWS;
    const int64_t last = tile.first + tile.tokens - 1;
    return {&tile, kv_head, kv_head * group_size + from, num_heads, tile.tokens * num_heads, batch.positions[last] + 1};
}

void Step::attend(Member &me, const Attention &a) {
    const int64_t size = TILE_ROWS * max_dim;
    if (num_units < UNITS_A_THREAD * team.size && num_splits > 1) {
        me.share(num_units * num_splits, [&](int64_t i, int64_t) {
            softmaxes[i] = attend_split(a, i / num_splits, i % num_splits, partial + i * size);
        });
        me.share(num_units, [&](int64_t unit, int64_t) {
            Softmax &all = softmaxes[unit * num_splits];
            for (int64_t split = 1; split < num_splits; split++)
                k.merge(&all, &softmaxes[unit * num_splits + split], unit_at(a, unit).num_rows, a.padded_dim);
            finish(a, unit, all);
        });
        return;
    }
    float *own = partial + (UNITS_A_THREAD * team.size * ceil_div(model.max_positions, SPLIT) + 2 * me.index) * size;
    me.share(num_units, [&](int64_t unit, int64_t) {
        const Unit its = unit_at(a, unit);
        Softmax all = attend_split(a, unit, 0, own);
        for (int64_t split = 1; split * SPLIT < its.end; split++) {
            const Softmax later = attend_split(a, unit, split, own + size);
            k.merge(&all, &later, its.num_rows, a.padded_dim);
        }
        finish(a, unit, all);
    });
}

Softmax Step::attend_split(const Attention &a, int64_t index, int64_t split, float *weighted) {
    const Unit unit = unit_at(a, index);
    const int64_t stop = (split + 1) * SPLIT;
    Query q[TILE_ROWS];
    for (int64_t r = 0; r < unit.num_rows; r++) {
        const int64_t row = unit.tile->first + r / unit.num_heads, head = unit.first_head + r % unit.num_heads;
        q[r] = {queries + row * q_stride + head * a.padded_dim, batch.positions[row]};
    }
    Softmax softmax{{}, {}, weighted};
    const int64_t *table = batch.block_tables + unit.tile->seq * batch.max_blocks;
    k.attend(&a, table, q, unit.num_rows, unit.kv_head, split * SPLIT, unit.end < stop ? unit.end : stop, &softmax);
    return softmax;
}

void Step::finish(const Attention &a, int64_t index, const Softmax &softmax) {
    const Unit unit = unit_at(a, index);
    for (int64_t r = 0; r < unit.num_rows; r++) {
        const int64_t row = unit.tile->first + r / unit.num_heads, head = unit.first_head + r % unit.num_heads;
        k.finish(&a, &softmax, r, head, attended + (row * a.num_heads + head) * a.head_dim);
    }
}

EXPORT Step *native_create(const Model *model) { return new Step(*model); }
EXPORT void native_destroy(Step *step) { delete step; }
EXPORT const float *native_hidden(const Step *step) { return step->hidden; }
EXPORT void native_step(Step *step, const Batch *batch, Verdict *verdict) {
    *verdict = check(step->model, *batch);
    if (verdict->refusal == TAKEN) step->run(*batch);
}
EXPORT void native_head(Step *step, const float *hidden, int64_t stride, int64_t count, float *logits) {
    step->run_head(hidden, stride, nullptr, count, logits);
}
