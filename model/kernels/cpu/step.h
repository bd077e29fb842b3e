// The step of one decoder: its memory, and the phases that all threads share out, one after another.
#pragma once
#include "model.h"
#include "routing.h"
#include "team.h"

constexpr int64_t PHASES_A_LAYER = 15, OTHER_PHASES = 5;
constexpr int64_t UNITS_A_THREAD = 4;  // with fewer, the context of each is split over the threads

inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive tokens of one sequence that attend together.
struct Tile {
    int64_t seq, first, tokens;
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
    void layer(Member &, const Layer &);
    void embed(int64_t row);
    const float *enter(int64_t row, const Norm &after, const Norm &before);
    void encode(const Linear &, const float *x, int64_t row);
    void multiply(Member &, const Linear &, Epilogue, int64_t num_rows);
    void add_product(Member &, const Linear &, const Norm &after);
    void mlp(Member &, const Layer &);
    void mixture(Member &, const Layer &);
    void multiply_groups(Member &, const Linear *, Epilogue);
    void place(const Layer &, int64_t row);
    void keep_queries(const Layer &);
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
    const CacheKernels &cache;
    Team team;
    Routing *routing;
    int64_t wide_stride = 0, row_bytes = 0, q_bytes = 0, q_stride = 0, num_units = 0, num_splits = 0, num_tiles = 0, max_dim = 0;
    float *x, *y, *wide, *attended, *scales, *partial, *expert_out;
    Softmax *softmaxes;
    uint8_t *queries, *encoded;
    Tile *tiles;
    Batch batch{};
    struct {
        const float *hidden;
        int64_t stride, count;
        const int64_t *picked;
        float *logits;
    } to_score{};
};
