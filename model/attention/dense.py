"""Causal attention over whole sequences of one length, without a cache: what training needs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.scores import Scores, explicit_attention, visible


class DenseCausalAttention:
    """An `Attend` for `batch` sequences of `length` tokens each, laid end to end. Differentiable."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [batch * length, num_heads, head_dim]; see `model.attention.scores.Attend`."""
        dtype = q.dtype
        if q.device.type == "cpu":
            # Measured on the CPU: the backward pass of bf16 attention is four times slower than in fp32.
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (x.unflatten(0, (self.batch, self.length)).transpose(1, 2) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            if scores.is_plain and scores.window is None and scores.sinks is None:
                grouped = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=grouped)
            else:
                positions = torch.arange(self.length, device=q.device)
                out = explicit_attention(scores, q, k, v, visible(positions, positions, scores))
        return out.transpose(1, 2).flatten(0, 1).to(dtype)
