"""Paged attention whose every sum has a fixed shape and order, so that no bit depends on the company a token keeps.

Query rows go in tiles of `ROWS`, keys in splits of `SPLIT` slots counted from the start of the sequence; the splits are
merged in order by the online softmax (Milakov and Gimelshein 2018). A split that lies in a row's future contributes
exactly nothing: its weights are 0, and it leaves the running maximum as it was. So a row's result is the same whether
it is computed alone, in a chunk, in a batch, or over blocks that another request has filled.
"""

import numpy as np
import torch
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.attention.scores import Scores, visible
from model.cache.pool import KVPool

ROWS = 16
SPLIT = 64
# Less than any score, and finite: a window may leave a row nothing of a split.
LOWEST = -1e30


class DeterministicAttention:
    """An `Attend` over the paged cache: slower than `GatheredAttention`, and the same to the last bit in any batch."""

    def __init__(self, plan: AttentionPlan, pool: KVPool) -> None:
        self.pool = pool
        device = pool.keys.device
        tiles = [
            (i, first, min(first + ROWS, int(plan.query_start_loc[i + 1])))
            for i in range(plan.num_seqs)
            for first in range(int(plan.query_start_loc[i]), int(plan.query_start_loc[i + 1]), ROWS)
        ]
        sequence, first, stop = np.array(tiles).T
        # Rows that pad a tile repeat its last one, and are dropped again.
        rows = np.minimum(first[:, None] + np.arange(ROWS), stop[:, None] - 1)
        past = plan.seq_lens - np.diff(plan.query_start_loc)
        positions = past[sequence][:, None] + rows - plan.query_start_loc[sequence][:, None]
        slots = plan.all_slots(0, plan.num_seqs)
        slots = np.pad(slots, ((0, 0), (0, -slots.shape[1] % SPLIT)))[sequence]
        own = rows == first[:, None] + np.arange(ROWS)
        self.slot_mapping = torch.from_numpy(plan.slot_mapping).to(device)
        self.rows = torch.from_numpy(rows).to(device)  # [num_tiles, ROWS]
        self.own = torch.from_numpy(own).to(device)  # [num_tiles, ROWS]
        self.positions = torch.from_numpy(positions).to(device)  # [num_tiles, ROWS]
        self.splits = torch.from_numpy(slots).to(device).split(SPLIT, dim=1)  # each [num_tiles, SPLIT]

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend. See `model.attention.scores.Attend`."""
        self.pool.store(scores.layer, self.slot_mapping, k, v)
        keys, values = self.pool.layer(scores.layer)
        out = torch.empty_like(q)
        out[self.rows[self.own]] = self._attend(scores, q[self.rows].float(), keys, values).to(q.dtype)[self.own]
        return out

    def _attend(self, scores: Scores, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q: [num_tiles, ROWS, num_heads, head_dim]; same shape out."""
        group_size = q.shape[2] // keys.shape[1]
        q = q.transpose(1, 2)  # [num_tiles, num_heads, ROWS, head_dim]
        if scores.sinks is None:
            largest, total = q.new_full((*q.shape[:3], 1), LOWEST), q.new_zeros((*q.shape[:3], 1))
        else:  # a key that comes before all others and has no value
            largest = scores.sinks.to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
            total = torch.ones_like(largest)
        weighted = torch.zeros_like(q)
        for index, slots in enumerate(self.splits):
            # [num_tiles, num_heads, SPLIT, head_dim]
            k, v = (x[slots].float().transpose(1, 2).repeat_interleave(group_size, dim=1) for x in (keys, values))
            key_positions = torch.arange(index * SPLIT, (index + 1) * SPLIT, device=q.device)
            seen = visible(self.positions, key_positions, scores)[:, None]  # [num_tiles, 1, ROWS, SPLIT]
            score = scores(q, k).masked_fill(~seen, -torch.inf)
            new_largest = torch.maximum(largest, score.amax(dim=-1, keepdim=True))
            weights = (score - new_largest).exp()
            shrink = (largest - new_largest).exp()
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            weighted = weighted * shrink + weights @ v
            largest = new_largest
        out: Tensor = (weighted / total).transpose(1, 2)
        return out
