"""Paged causal attention, written to be read: the oracle that every faster path is held against."""

import math

import torch
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.cache.pool import KVPool


class ReferenceAttention:
    """An `Attend` over the paged cache, one sequence and one equation at a time. In fp32, whatever the cache holds."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.plan, self.pool = plan, pool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend (Vaswani et al. 2017, eq. 1). See `model.decoder.Attend`."""
        plan, pool = self.plan, self.pool
        pool.store(layer, torch.from_numpy(plan.slot_mapping), k, v)
        keys, values = pool.layer(layer)
        out = torch.empty_like(q)
        for i in range(plan.num_seqs):
            rows = slice(int(plan.query_start_loc[i]), int(plan.query_start_loc[i + 1]))
            slots = torch.from_numpy(plan.slots(i, i + 1)[0])  # [seq_len]
            out[rows] = causal_attention(q[rows], keys[slots], values[slots]).to(q.dtype)
        return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for the newest tokens of one sequence, in fp32.

    q: [num_new, num_heads, head_dim]; k, v: [seq_len, num_kv_heads, head_dim], of which the last `num_new` are the new
    tokens' own. Row i sees everything up to and including itself: its future has weight 0.
    """
    num_new, num_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = k.shape
    k, v = (x.float().repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) / math.sqrt(head_dim)
    future = torch.arange(seq_len) > torch.arange(seq_len - num_new, seq_len)[:, None]  # [num_new, seq_len]
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
