// The part of a step that a mixture of experts computes in the place of the MLP.
#include <string.h>

#include "step.h"

// A step with experts has one part: places are counted over all rows. Each expert computes its own tokens; a token's
// experts are summed in their order, whoever else has chosen them.
void Step::mixture(Member &me, const Part &part, const Layer &l) {
    const Range rows = part.rows, places{0, rows.count * l.experts.num_chosen};
    const int64_t width = model.hidden_size;
    const bool normed = l.mlp_norm.kind != NO_NORM;
    me.share_rows(rows, [&](int64_t row) {
        routing->choose(l.experts, k, row, enter(row, l.attention_post_norm, l.mlp_norm), width);
    });
    me.share(1, [&](int64_t, int64_t) { routing->arrange(l.experts, rows.count); });
    me.share_rows(places, [&](int64_t place) {
        encode(part, l.experts.up[0], (normed ? y : x) + routing->row_at(place) * hidden_stride, place);
    });
    multiply_groups(me, l.experts.up, {wide, wide_stride, 0.0f, l.gated ? GATE : ACTIVATE, l.activation});
    me.share_rows(places, [&](int64_t place) { encode(part, l.experts.down[0], wide + place * wide_stride, place); });
    multiply_groups(me, l.experts.down, {expert_out, hidden_stride, 0.0f, STORE, SILU});
    me.share_rows(rows, [&](int64_t row) {
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
