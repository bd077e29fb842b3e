// What a step reads through, it checks first: past a table it would crash, or store into another request's block.
#include "model.h"

static Verdict check_sequence(const Model &model, const Batch &batch, int64_t seq) {
    const int64_t block_size = model.layers[0].attention.block_size;
    const int64_t first = batch.query_start_loc[seq], last = batch.query_start_loc[seq + 1];
    if (last <= first || last > batch.num_tokens) return {BAD_LAYOUT, seq, last};
    for (int64_t row = first; row < last; row++) {
        if (batch.token_ids[row] < 0 || batch.token_ids[row] >= model.vocab_size)
            return {BAD_TOKEN, row, batch.token_ids[row]};
        const int64_t position = batch.positions[row];
        if (position < 0 || position >= model.max_positions || position != batch.positions[first] + row - first)
            return {BAD_POSITION, row, position};
    }
    const int64_t num_blocks = batch.positions[last - 1] / block_size + 1;
    if (num_blocks > batch.max_blocks) return {BAD_BLOCK, seq, 0};
    for (int64_t i = 0; i < num_blocks; i++) {
        const int64_t block = batch.block_tables[seq * batch.max_blocks + i];
        if (block < 1 || block > model.num_blocks) return {BAD_BLOCK, seq, block};
    }
    return {TAKEN, 0, 0};
}

Verdict check(const Model &model, const Batch &batch) {
    if (batch.num_tokens < 1 || batch.num_tokens > model.max_tokens) return {TOO_MANY_TOKENS, 0, batch.num_tokens};
    const int64_t *starts = batch.query_start_loc;
    if (batch.num_seqs < 1 || starts[0] != 0 || starts[batch.num_seqs] != batch.num_tokens)
        return {BAD_LAYOUT, 0, batch.num_seqs};
    for (int64_t seq = 0; seq < batch.num_seqs; seq++)
        if (const Verdict verdict = check_sequence(model, batch, seq); verdict.refusal != TAKEN) return verdict;
    if (batch.num_samples < 0 || batch.num_samples > model.max_tokens) return {TOO_MANY_TOKENS, 0, batch.num_samples};
    for (int64_t i = 0; i < batch.num_samples; i++)
        if (batch.sample_rows[i] < (i ? batch.sample_rows[i - 1] + 1 : 0) || batch.sample_rows[i] >= batch.num_tokens)
            return {BAD_SAMPLE, i, batch.sample_rows[i]};
    return {TAKEN, 0, 0};
}
