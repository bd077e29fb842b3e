"""Paged causal attention, written to be read: the oracle that every faster path is held against."""

import torch
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.cache.pool import KVPool


class ReferenceAttention:
    """An `Attend` over the paged cache, one sequence and one equation at a time. In fp32, whatever the cache holds."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.plan, self.pool = plan, pool

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend. See `model.attention.scores.Attend`."""
        plan, pool = self.plan, self.pool
        pool.store(scores.layer, torch.from_numpy(plan.slot_mapping).to(k.device), k, v)
        out = torch.empty_like(q)
        for i in range(plan.num_seqs):
            rows = slice(int(plan.query_start_loc[i]), int(plan.query_start_loc[i + 1]))
            slots = torch.from_numpy(plan.all_slots(i, i + 1)[0]).to(k.device)
            keys, values = pool.gather(scores.layer, slots)  # [seq_len, num_kv_heads, head_dim]
            out[rows] = causal_attention(scores, q[rows], keys, values).to(q.dtype)
        return out


def causal_attention(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(score(q, k)) v for the newest tokens of one sequence, in fp32 (Vaswani et al. 2017, eq. 1).

    q: [num_new, num_heads, head_dim]; k, v: [seq_len, num_kv_heads, head_dim], of which the last `num_new` are the new
    tokens' own. Row i sees everything up to and including itself, as far as its window goes.
    """
    return torch.einsum("hqk,khd->qhd", causal_weights(scores, q, k), _per_query_head(v, q.shape[1]))


def causal_weights(scores: Scores, q: Tensor, k: Tensor) -> Tensor:
    """The softmax weights of the newest tokens of one sequence, [num_heads, num_new, seq_len], in fp32.

    Shapes as in `causal_attention`. What a row does not see has weight 0; with learned sinks a row sums to less than 1.
    """
    num_new, num_heads, _ = q.shape
    seq_len = len(k)
    k = _per_query_head(k, num_heads)
    score = scores(q.float().transpose(0, 1), k.transpose(0, 1))  # [num_heads, num_new, seq_len]
    key = torch.arange(seq_len, device=q.device)
    row = key[seq_len - num_new :, None]
    hidden = key > row
    if scores.window is not None:
        hidden |= (key <= row - scores.window) & (key >= scores.num_sink_tokens)
    odds = score.masked_fill(hidden, -torch.inf)
    largest = odds.amax(dim=-1, keepdim=True)
    total = (odds - largest).exp().sum(dim=-1, keepdim=True)
    if scores.sinks is not None:
        total = total + (scores.sinks.float()[:, None, None] - largest).exp()
    weights: Tensor = (odds - largest).exp() / total
    return weights


def _per_query_head(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values in fp32, each key/value head once for each query head of its group."""
    return x.float().repeat_interleave(num_heads // x.shape[1], dim=1)
