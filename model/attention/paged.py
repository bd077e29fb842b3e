"""Paged attention on the GPU by our own Triton kernels: decodes in one launch, prefills in another, nothing gathered.

Additive scores have no kernel: their layers go to `GatheredAttention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    def of(cls, plan: AttentionPlan, tensors: Sequence[Tensor]) -> "PagedStep":
        """tensors: the plan's `arrays`, on the device."""
        longest = int(plan.seq_lens[: plan.num_decodes].max(initial=0))
        return cls(plan.block_size, plan.num_decodes, longest, *tensors)

    @staticmethod
    def arrays(plan: AttentionPlan, group_size: int) -> list[NDArray[Any]]:
        """What goes to the device. group_size: query heads of one key/value head."""
        narrow = (plan.block_tables, plan.seq_lens, plan.query_start_loc)
        return [plan.slot_mapping, *(array.astype(np.int32) for array in narrow), prefill_tiles(plan, group_size)]

    @classmethod
    def planned(cls, plan: AttentionPlan, group_size: int, device: torch.device) -> "PagedStep":
        """A plan, copied to the device array by array."""
        return cls.of(plan, [torch.from_numpy(array).to(device) for array in cls.arrays(plan, group_size)])

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
        step = self._step = self._step or PagedStep.planned(self.plan, q.shape[1] // k.shape[1], q.device)
        self.pool.store(scores.layer, step.slots, k, v)
        return step.attend(scores, q, *self.pool.layer(scores.layer))
