// A decoder, and a step of it: rows of (token, position, block table) in, hidden states and logits out.
#pragma once
#include "native.h"

// A mixture of experts in the place of the MLP; none of them: `up` and `down` of the layer are the MLP.
// router: [count, hidden_size]; each token goes through `num_chosen` of them.
struct Experts {
    const float *router;
    const Linear *up, *down;
    int64_t count, num_chosen, normalize;
};

// One layer. Norms of kind NO_NORM are left out. up: where gated, panels of gate and up take turns.
// q_norm, k_norm: over each head, or (norm_whole) over all heads at once. cos, sin: [max_positions, rotary_half].
struct Layer {
    Norm attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm;
    Linear qkv, output, up, down;
    Experts experts;
    Attention attention;
    const float *cos, *sin;
    int64_t rotary_half;
    Activation activation;
    int32_t gated, norm_whole;
};

// embedding: [vocab_size, hidden_size] bf16; position_embedding: [max_positions, hidden_size] bf16 or null.
struct Model {
    const uint16_t *embedding, *position_embedding;
    const Layer *layers;
    Norm norm;
    Linear head;
    int64_t vocab_size, hidden_size, num_layers, max_positions, num_blocks, max_tokens, num_threads;
    float embedding_scale, final_cap;
    int32_t instruction_set;
    Dtype cache_dtype;
};

// The sequences of a step, as model.attention.plan.AttentionPlan lays them out; none reads a block that another one
// stores into. num_samples rows, in order, get logits, [num_samples, head.panels * 32], with the largest of each and its
// index. Where queries is not null, each layer's queries of these rows are kept there, [num_layers, num_samples,
// num_heads, padded_dim] bf16.
struct Batch {
    const int64_t *token_ids, *positions, *query_start_loc, *block_tables, *sample_rows;
    float *logits, *largest;
    int64_t *likeliest;
    uint16_t *queries;
    int64_t num_tokens, num_seqs, max_blocks, num_samples;
};

// Why a batch was refused, and where. Nothing was computed or stored then.
enum Refusal : int64_t { TAKEN, TOO_MANY_TOKENS, BAD_LAYOUT, BAD_TOKEN, BAD_POSITION, BAD_BLOCK, BAD_SAMPLE };
struct Verdict {
    Refusal refusal;
    int64_t index, value;
};

Verdict check(const Model &, const Batch &);
