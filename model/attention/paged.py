"""Paged attention on the GPU by our own Triton kernels: decodes in one launch, prefills in another, nothing gathered.

Additive scores have no kernel: their layers go to `GatheredAttention`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.attention.triton_decode import decode_attention
from model.attention.triton_prefill import prefill_attention, prefill_tiles
from model.cache.pool import KVPool


@dataclass(frozen=True)
class PagedStep:
    """A plan on the device: what the kernels of all layers read.

    slots: [num_tokens]; tables: [num_seqs, max_blocks]; lens: [num_seqs]; starts: [num_seqs + 1]; tiles: see
    `prefill_tiles`. num_decodes: so many leading sequences have one new token, none longer than `longest`.
    """

    block_size: int
    num_decodes: int
    longest: int
    slots: Tensor
    tables: Tensor
    lens: Tensor
    starts: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, plan: AttentionPlan, group_size: int, device: torch.device) -> "PagedStep":
        """Copy a plan to the device. group_size: query heads of one key/value head."""
        return cls(
            block_size=plan.block_size,
            num_decodes=plan.num_decodes,
            longest=int(plan.seq_lens[: plan.num_decodes].max(initial=0)),
            slots=torch.from_numpy(plan.slot_mapping).to(device),
            tables=torch.from_numpy(plan.block_tables).to(device, torch.int32),
            lens=torch.from_numpy(plan.seq_lens).to(device, torch.int32),
            starts=torch.from_numpy(plan.query_start_loc).to(device, torch.int32),
            tiles=torch.from_numpy(prefill_tiles(plan, group_size)).to(device),
        )

    def attend(self, scores: Scores, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the step's tokens, whose keys and values are stored. q: [num_tokens, num_heads, head_dim]; keys,
        values: [num_slots, num_kv_heads, head_dim]; returns q's shape, contiguous.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decodes = self.num_decodes
        if decodes:
            decode_attention(
                scores, q[:decodes], keys, values, out[:decodes], self.tables, self.lens,
                block_size=self.block_size, longest=self.longest,
            )  # fmt: skip
        if len(self.tiles):
            prefill_attention(
                scores, q, keys, values, out, self.tiles, self.starts, self.lens, self.tables,
                block_size=self.block_size,
            )  # fmt: skip
        return out


class PagedAttention:
    """An `Attend` over the paged cache, for a decoder whose other parts are torch's."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.plan, self.pool = plan, pool
        self._step: PagedStep | None = None
        self._gathered: GatheredAttention | None = None

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend. See `model.attention.scores.Attend`."""
        if scores.energy is not None:
            self._gathered = self._gathered or GatheredAttention(self.plan, self.pool)
            return self._gathered(scores, q, k, v)
        step = self._step = self._step or PagedStep.of(self.plan, q.shape[1] // k.shape[1], q.device)
        self.pool.store(scores.layer, step.slots, k, v)
        return step.attend(scores, q, *self.pool.layer(scores.layer))
