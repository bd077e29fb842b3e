"""Log-probabilities of the model's own distribution, for those who ask."""

from collections.abc import Sequence

from torch import Tensor

from model.sampling.result import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """logits: [rows, vocab_size], as the model gave them; token_ids: [rows]; num_top: how many to list for each."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None]).squeeze(1).tolist()
    values, ids = logprobs.topk(min(max(num_top), logits.shape[-1]), dim=-1)
    return [
        TokenLogprobs(logprob, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, row_ids, row_values, count in zip(chosen, ids.tolist(), values.tolist(), num_top, strict=True)
    ]
