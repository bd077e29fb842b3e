// The part of a step that a mixture of experts computes in the place of the MLP.
#include <string.h>

#include "step.h"

// Each expert computes its own tokens; a token's experts are summed in their order, whoever else has chosen them.
void Step::mixture(Member &me, const Layer &l) {
    const int64_t n = batch.num_tokens, places = n * l.experts.num_chosen, width = model.hidden_size;
    const bool normed = l.mlp_norm.kind != NO_NORM;
    me.share_rows(n, [&](int64_t row) {
        routing->choose(l.experts, k, row, enter(row, l.attention_post_norm, l.mlp_norm), width);
    });
    me.share(1, [&](int64_t, int64_t) { routing->arrange(l.experts, n); });
    me.share_rows(places, [&](int64_t place) {
        encode(l.experts.up[0], (normed ? y : x) + routing->row_at(place) * hidden_stride, place);
    });
    multiply_groups(me, l.experts.up, {wide, wide_stride, 0.0f, l.gated ? GATE : ACTIVATE, l.activation});
    me.share_rows(places, [&](int64_t place) { encode(l.experts.down[0], wide + place * wide_stride, place); });
    multiply_groups(me, l.experts.down, {expert_out, hidden_stride, 0.0f, STORE, SILU});
    me.share_rows(n, [&](int64_t row) {
        float *sum = y + row * hidden_stride;
        memset(sum, 0, width * sizeof(float));
        for (int64_t i = 0; i < l.experts.num_chosen; i++) {
            const Routing::Choice &choice = routing->choices_of(row)[i];
            k.add_scaled(sum, expert_out + choice.place * hidden_stride, choice.weight, width);
        }
        if (l.mlp_post_norm.kind == NO_NORM) k.add_scaled(x + row * hidden_stride, sum, 1.0f, width);
    });
}

// The products of each group of places with its own expert's map.
void Step::multiply_groups(Member &me, const Linear *experts, Epilogue epilogue) {
    const int64_t panels = experts[0].panels / (epilogue.then == GATE ? 2 : 1);
    const auto product = experts[0].dtype == INT8 ? k.linear_int8 : k.linear_bf16;
    me.share(routing->num_groups * panels, [&](int64_t task, int64_t after) {
        const Routing::Group &group = routing->group(task / panels);
        const Linear &linear = experts[group.expert];
        const Rows rows{encoded + group.first * linear.stride, scales + group.first, group.count, linear.stride};
        Epilogue own = epilogue;
        own.out += group.first * own.stride;
        const int64_t next = after / panels == task / panels ? after % panels : panels;
        product(&linear, &rows, task % panels, &own, next);
    });
}
