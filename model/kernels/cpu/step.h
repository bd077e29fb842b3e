// The step of one decoder: its memory, and the phases that all threads share out, one after another.
#pragma once
#include "model.h"
#include "routing.h"
#include "team.h"

constexpr int64_t PHASES_A_LAYER = 15, OTHER_PHASES = 5;
constexpr int64_t UNITS_A_THREAD = 4;  // with fewer, the context of each is split over the threads
// Two parts have 8 rows each at least, four 16: weights that are read more often must be used by more rows. On two cores
// a step of 16 rows takes 8.3 ms in two parts and 9.9 in one; of 8 rows two processes with 4 each gave 0.8 of the tokens.
constexpr int64_t ROWS_A_PART = 4;
// Of a larger step each part has so many rows, for the caches' sake: a prompt of 512 tokens took 232 ms instead of 302.
constexpr int64_t MAX_ROWS_A_PART = 128;

inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive tokens of one sequence that attend together.
struct Tile {
    int64_t seq, first, tokens;
};

// Some rows of a step, with their samples: they go through all phases in a lane of their own. Threads that meet at the
// end of each phase wait for the one that has lost its core, some 500 times a step; threads with parts of their own meet
// once. And what a phase makes of so few rows is still in the core's cache when the next one reads it. Each part reads
// the weights, which its rows must be worth.
struct Part {
    Range rows, samples;
    int64_t lane, num_tiles, num_units, num_splits;
    bool follows;  // its first row goes on with a sequence of the part before, whose keys and values it attends to
};

class Step {
  public:
    Step(const Model &model, const Kernels &kernels);
    ~Step();
    void run(const Batch &batch);
    void run_head(const float *hidden, int64_t stride, const int64_t *picked, int64_t count, float *logits);

    const Model model;
    const int64_t hidden_stride;
    float *hidden;         // [max_tokens, hidden_stride]: after the final norm
    bool complete = true;  // there was memory for everything

  private:
    template <class T>
    T *buffer(int64_t count);
    void plan_parts();
    void plan_tiles(Part &, int64_t seq);
    void compute(Member &, const Part &);
    void layer(Member &, const Part &, const Layer &);
    void embed(int64_t row);
    const float *enter(int64_t row, const Norm &after, const Norm &before);
    void encode(const Part &, const Linear &, const float *x, int64_t index);
    void multiply(Member &, const Part &, const Linear &, Epilogue, int64_t num_rows);
    void add_product(Member &, const Part &, const Linear &, const Norm &after);
    void mlp(Member &, const Part &, const Layer &);
    void mixture(Member &, const Part &, const Layer &);
    void multiply_groups(Member &, const Linear *, Epilogue);
    void place(const Layer &, int64_t row);
    void keep_queries(const Part &, const Layer &);
    void attend(Member &, const Part &, const Attention &);
    Softmax attend_split(const Part &, const Attention &, int64_t unit, int64_t split, float *weighted);
    void finish(const Part &, const Attention &, int64_t unit, const Softmax &);
    void head(Member &, const Part &);

    struct Unit {  // a tile's queries that share one key/value head
        const Tile *tile;
        int64_t kv_head, first_head, num_heads, num_rows, end;
    };
    Unit unit_at(const Part &, const Attention &, int64_t unit) const;

    const Kernels &k;
    const CacheKernels &cache;
    const int64_t max_parts;
    Team team;
    Routing *routing;
    int64_t wide_stride = 0, row_bytes = 0, q_bytes = 0, q_stride = 0, attended_stride = 0, max_dim = 0, max_splits;
    float *x, *y, *wide, *attended, *scales, *partial, *expert_out;
    Softmax *softmaxes;
    uint8_t *queries, *encoded;
    Tile *tiles;
    Part *parts;
    int64_t num_parts = 1;
    Batch batch{};
    struct {
        const float *hidden;
        int64_t stride;
        const int64_t *picked;
        float *logits;
    } to_score{};
};
