"""Paged attention on the GPU by our own Triton kernels: decodes in one launch, prefills in another, nothing gathered.

Additive scores have no kernel: their layers go to `GatheredAttention`.
"""

import torch
from torch import Tensor

from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.attention.triton_decode import decode_attention
from model.attention.triton_prefill import prefill_attention, prefill_tiles
from model.cache.pool import KVPool


class PagedAttention:
    """An `Attend` over the paged cache. What layers share goes to the device once per step."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.plan, self.pool = plan, pool
        device = pool.keys.device
        self.slot_mapping = torch.from_numpy(plan.slot_mapping).to(device)
        self.tables = torch.from_numpy(plan.block_tables).to(device, torch.int32)
        self.lens = torch.from_numpy(plan.seq_lens).to(device, torch.int32)
        self.starts = torch.from_numpy(plan.query_start_loc).to(device, torch.int32)
        self.longest = int(plan.seq_lens[: plan.num_decodes].max(initial=0))
        self._tiles: Tensor | None = None
        self._gathered: GatheredAttention | None = None

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend. See `model.attention.scores.Attend`."""
        if scores.energy is not None:
            self._gathered = self._gathered or GatheredAttention(self.plan, self.pool)
            return self._gathered(scores, q, k, v)
        self.pool.store(scores.layer, self.slot_mapping, k, v)
        keys, values = self.pool.layer(scores.layer)
        block_size, decodes = self.pool.block_size, self.plan.num_decodes
        if decodes == self.plan.num_seqs:
            return decode_attention(
                scores, q, keys, values, self.tables, self.lens, block_size=block_size, longest=self.longest
            )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            out[:decodes] = decode_attention(
                scores, q[:decodes], keys, values, self.tables, self.lens, block_size=block_size, longest=self.longest
            )
        if self._tiles is None:
            self._tiles = torch.from_numpy(prefill_tiles(self.plan, q.shape[1] // k.shape[1])).to(q.device)
        prefill_attention(
            scores, q, keys, values, out, self._tiles, self.starts, self.lens, self.tables, block_size=block_size
        )
        return out
