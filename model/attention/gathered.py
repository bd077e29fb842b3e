"""Paged attention with torch's own kernels: gather each sequence's past, then one fused call.

All decodes of a step share one gather and one call; prefills go one by one. It runs on any device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.cache.pool import KVPool


@dataclass(frozen=True)
class _Prefill:
    """One sequence with several new tokens. mask: [num_new, seq_len], or None where nothing was cached before."""

    rows: slice
    slots: Tensor
    mask: Tensor | None


class GatheredAttention:
    """An `Attend` over the paged cache. What the layers share is computed here, once per step."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.pool = pool
        self.device = pool.keys.device
        self.slot_mapping = torch.from_numpy(plan.slot_mapping).to(self.device)
        self.num_decodes = plan.num_decodes
        if self.num_decodes:
            self.decode_slots = torch.from_numpy(plan.slots(0, plan.num_decodes)).to(self.device)
            lens = torch.from_numpy(plan.seq_lens[: plan.num_decodes]).to(self.device)
            longest = self.decode_slots.shape[1]
            past = torch.arange(longest, device=self.device) < lens[:, None]
            self.decode_mask = past[:, None, None, :]  # [num_decodes, 1, 1, longest]
        self.prefills = [self._plan_prefill(plan, i) for i in range(plan.num_decodes, plan.num_seqs)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend. See `model.decoder.Attend`."""
        self.pool.store(layer, self.slot_mapping, k, v)
        keys, values = self.pool.layer(layer)
        if not self.prefills:
            return self._decode(q, keys, values)
        out = torch.empty_like(q)
        if self.num_decodes:
            out[: self.num_decodes] = self._decode(q[: self.num_decodes], keys, values)
        for prefill in self.prefills:
            out[prefill.rows] = _attend_prefill(q[prefill.rows], keys, values, prefill)
        return out

    def _plan_prefill(self, plan: AttentionPlan, i: int) -> _Prefill:
        start, stop = int(plan.query_start_loc[i]), int(plan.query_start_loc[i + 1])
        seq_len, num_new = int(plan.seq_lens[i]), stop - start
        slots = torch.from_numpy(plan.slots(i, i + 1)[0]).to(self.device)
        mask = None
        if seq_len > num_new:
            mask = torch.ones(num_new, seq_len, dtype=torch.bool, device=self.device).tril(seq_len - num_new)
        return _Prefill(slice(start, stop), slots, mask)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q: [num_decodes, num_heads, head_dim]. The query heads of a group stand as rows of one query: on the CPU this
        took a layer at batch 8, context 512, from 4.2 ms to 0.55 ms.
        """
        num_kv_heads = keys.shape[1]
        q = q.unflatten(1, (num_kv_heads, -1))  # [num_decodes, num_kv_heads, group_size, head_dim]
        k = _gather(keys, self.decode_slots).transpose(1, 2)
        v = _gather(values, self.decode_slots).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.decode_mask).flatten(1, 2)


def _attend_prefill(q: Tensor, keys: Tensor, values: Tensor, prefill: _Prefill) -> Tensor:
    k, v = (_gather(x, prefill.slots[None]).transpose(1, 2) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=prefill.mask, is_causal=prefill.mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """cache: [num_slots, num_kv_heads, head_dim], slots: [seqs, length] -> [seqs, length, num_kv_heads, head_dim]."""
    rows = cache.flatten(1).index_select(0, slots.flatten())
    return rows.view(*slots.shape, *cache.shape[1:])
