// What Python hands to the native step, and the table of kernels that each instruction set fills in.
//
// Every struct here has its twin in `library.py`, field for field. Pointers belong to Python, which keeps them alive.
// Matrices are packed in panels of 32 output channels; rows are tokens.
#pragma once
#include <stdint.h>

constexpr int64_t PANEL = 32;      // output channels of a weight panel
constexpr int64_t GROUP = 16;      // keys side by side in the cache
constexpr int64_t SPAN = 64;       // keys that one step of the online softmax takes in
constexpr int64_t SPLIT = 256;     // keys after which a row's softmax starts afresh, to be merged in order
constexpr int64_t TILE_ROWS = 12;  // query rows that attend together
constexpr float EMPTY = -1e30f;    // the running maximum of a softmax that has seen nothing; finite, so differences are

enum Dtype : int32_t { INT8, BF16, NUM_DTYPES };
enum NormKind : int32_t { NO_NORM, RMS_NORM, LAYER_NORM };
enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU };
enum Then : int32_t { STORE, ADD, ACTIVATE, GATE, CAP };

// weight, bias: [width]; bias may be null.
struct Norm {
    const float *weight, *bias;
    float eps;
    NormKind kind;
};

// y = W x + bias. weight: int8 [panels][stride / 4][32][4], or bf16 [panels][stride / 4][32][2]; zeros where padded.
// in: inputs; stride: bytes of an encoded row, a multiple of 16 (int8) or 32 (bf16).
// scale, correction (128 times the sum of a channel's weights): [panels * 32], int8 only. bias: [panels * 32] or null.
struct Linear {
    const void *weight;
    const float *scale, *bias;
    const int32_t *correction;
    int64_t in, stride, panels;
    Dtype dtype;
};

// Rows that a linear map reads: u8 = value + 128 with one scale a row, or bf16 (scale unused).
struct Rows {
    uint8_t *data;
    float *scale;
    int64_t count, stride;
};

// What becomes of a product's panel. GATE takes panels in pairs, gate and up.
struct Epilogue {
    float *out;
    int64_t stride;
    float cap;
    Then then;
    Activation activation;
};

// Causal attention of one layer. Query heads h * group_size and on share key/value head h.
// cache: [blocks][num_kv_heads][groups], each group 16 tokens in group_bytes as cache_bf16.h or cache_int8.h has them.
// window: keys that a query sees, itself included (0: all); the first `sink_tokens` stay visible beyond it.
// softcap: scores become cap * tanh(score / cap) (0: they do not). sinks: [num_heads] logits that take weight away.
struct Attention {
    uint8_t *cache;
    const float *sinks;
    int64_t num_heads, num_kv_heads, head_dim, padded_dim, block_size, groups, group_bytes;
    int64_t window, sink_tokens;
    float scale, softcap;
};

// One query row of a tile, as the cache's kernels encode it, and where it stands.
struct Query {
    const uint8_t *q;
    int64_t position;
};

// The softmax of up to TILE_ROWS rows so far: largest score, sum of weights, weighted sum of values.
// weighted: [rows, padded_dim].
struct Softmax {
    float largest[TILE_ROWS], total[TILE_ROWS];
    float *weighted;
};

// The kernels that know how numbers lie in the cache.
struct CacheKernels {
    int64_t (*query_bytes)(int64_t padded_dim);
    void (*encode_query)(const float *q, int64_t width, uint8_t *out, int64_t padded_dim);
    void (*store)(const Attention *, int64_t block, int64_t offset, const float *k, const float *v);
    void (*attend)(const Attention *, const int64_t *table, const Query *, int64_t rows, int64_t kv_head, int64_t begin,
                   int64_t end, Softmax *);
};

// One instruction set's kernels. Their twins in torch are in tests/model/test_native_kernels.py.
struct Kernels {
    void (*embed)(const uint16_t *row, int64_t width, float scale, float *out);
    void (*add_scaled)(float *x, const float *y, float scale, int64_t width);
    void (*normalize)(const Norm *, const float *x, int64_t width, float *out);
    void (*encode_int8)(const float *x, int64_t width, uint8_t *out, int64_t stride, float *scale);
    void (*encode_bf16)(const float *x, int64_t width, uint16_t *out, int64_t stride);
    void (*linear_int8)(const Linear *, const Rows *, int64_t panel, const Epilogue *, int64_t next_panel);
    void (*linear_bf16)(const Linear *, const Rows *, int64_t panel, const Epilogue *, int64_t next_panel);
    void (*rotate)(float *head, const float *cos, const float *sin, int64_t half);
    void (*merge)(Softmax *, const Softmax *later, int64_t rows, int64_t padded_dim);
    void (*route)(const float *x, const float *router, int64_t width, int64_t num_experts, float *odds);
    void (*likeliest)(const float *logits, int64_t width, int64_t *index, float *value);
    void (*finish)(const Attention *, const Softmax *, int64_t row, int64_t head, float *out);
    CacheKernels cache[NUM_DTYPES];
};
