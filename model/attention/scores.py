"""The three score functions: how much a query asks of a key. All else about attention is the same for all of them.

    scaled dot product (Vaswani et al. 2017, eq. 1)       q . k / sqrt(head_dim)
    multiplicative (Luong et al. 2015, "general")         q W . k
    additive (Bahdanau et al. 2015)                       v . tanh(q Wq + k Wk)

W, Wq, Wk and v are each head's own. What is projected is projected before it turns by its position (`model.rotary`), so
the cache holds keys as the score reads them: `k` for the dot products, `k Wk` for the additive score. Queries and keys
are themselves linear in the hidden state, so for serving the projections fold into theirs (`fold`): a multiplicative
score then costs what a dot product does, and takes every fast path of it.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.config import ModelConfig

# The additive score makes head_dim numbers for each pair of query and key: so many of them at once at most.
MAX_PAIR_ELEMENTS = 1 << 22


class Scores(nn.Module):
    """One layer's score function with its parameters, and what bends the scores before and in the softmax.

    window: a token sees so many tokens, itself included; None: all before it. num_sink_tokens: the first tokens of a
        sequence, visible beyond the window.
    soft_cap: scores become cap * tanh(score / cap).
    sinks: [num_heads] or None: a score for each head that takes part in the softmax and weighs nothing.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer
        self.window, self.num_sink_tokens = config.window(layer), config.num_sink_tokens
        self.soft_cap = config.attention_soft_cap
        scaled = config.attention == "scaled_dot_product"
        self.scale = config.attention_scale or (1 / math.sqrt(dim) if scaled else 1.0)
        self.query_projection = None if scaled else nn.Parameter(torch.empty(heads, dim, dim))
        additive = config.attention == "additive"
        self.key_projection = nn.Parameter(torch.empty(kv_heads, dim, dim)) if additive else None
        self.energy = nn.Parameter(torch.empty(heads, dim)) if additive else None
        self.sinks = nn.Parameter(torch.empty(heads)) if config.sink_logits else None

    @property
    def is_plain(self) -> bool:
        """Whether softmax(scale * q k^T) is all there is to it but for masks: what fused kernels compute."""
        return self.energy is None and self.soft_cap is None

    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q: [num_tokens, num_heads, head_dim], k: [num_tokens, num_kv_heads, head_dim]; the same shapes out."""
        if self.query_projection is not None:
            q = torch.einsum("thd,hde->the", q, self.query_projection)
        if self.key_projection is not None:
            k = torch.einsum("thd,hde->the", k, self.key_projection)
        return q, k

    def forward(self, q: Tensor, k: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Scores of each query for each key, before any mask.

        q: [..., num_heads, num_queries, head_dim]; k: [..., num_heads, num_keys, head_dim]; returns
        [..., num_heads, num_queries, num_keys]. heads: those that q and k are of, where not all are there.
        """
        if self.energy is None:
            scores = q @ k.transpose(-1, -2)
        else:
            energy = self.energy if heads is None else self.energy[list(heads)]
            scores = additive(q, k, energy.to(q.dtype))
        scores = scores * self.scale
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Start where the scaled dot product starts: W near 1 / sqrt(head_dim) times the identity; sinks at 0."""
        for projection, size in ((self.query_projection, 1.0), (self.key_projection, 1.0)):
            if projection is not None:
                dim = projection.shape[-1]
                near = size if self.energy is not None else 1 / (math.sqrt(dim) * self.scale)
                noise = torch.empty_like(projection).normal_(0.0, 0.02, generator=generator)
                projection.copy_(near * torch.eye(dim) + noise)
        if self.energy is not None:
            self.energy.normal_(0.0, 1 / math.sqrt(self.energy.shape[-1]), generator=generator)
        if self.sinks is not None:
            self.sinks.zero_()

    @torch.no_grad()
    def fold(self, q: Tensor, k: Tensor) -> None:
        """Multiply the projections into the rows that make queries and keys, in place, and drop them.

        q: [num_heads, head_dim, ...], k: [num_kv_heads, head_dim, ...]: rows of the weight (or of the bias).
        """
        if self.query_projection is not None:
            q.copy_(torch.einsum("hd...,hde->he...", q.float(), self.query_projection.float()))
        if self.key_projection is not None:
            k.copy_(torch.einsum("hd...,hde->he...", k.float(), self.key_projection.float()))


class Attend(Protocol):
    """An attention backend, planned for one step: causal attention of the step's tokens in one layer."""

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; returns the shape of q."""
        ...


def additive(q: Tensor, k: Tensor, energy: Tensor) -> Tensor:
    """v . tanh(q + k) of projected queries and keys (Bahdanau et al. 2015, appendix A.1.2). Differentiable.

    q: [..., num_heads, num_queries, head_dim]; k: [..., num_heads, num_keys, head_dim]; energy: [num_heads, head_dim].
    Some queries at a time: all pairs at once would need head_dim numbers each.
    """
    scores: Tensor = _Additive.apply(q, k, energy)  # type: ignore[no-untyped-call]
    return scores


class _Additive(torch.autograd.Function):
    """The backward pass computes each slice's tanh again: kept, they would be all pairs at once after all."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, energy: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, energy)
        scores = q.new_empty(*q.shape[:-1], k.shape[-2])
        room = _room(q, k)
        for rows in _slices(q, k):
            # Not a matrix product: the order of its sums depends on how many pairs there are, and a score must not.
            pairs = _tanh(q[..., rows, :], k, room).mul_(energy[:, None, None])
            scores[..., rows, :] = pairs.sum(dim=-1)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, energy = ctx.saved_tensors
        to_q, to_k, to_energy = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(energy)
        room, more_room = _room(q, k), _room(q, k)
        for rows in _slices(q, k):
            wanted = grad[..., rows, :].unsqueeze(-1)
            tanh = _tanh(q[..., rows, :], k, room)
            found = torch.mul(tanh, wanted, out=_as(more_room, tanh.shape))
            to_energy += found.sum(dim=(-3, -2)).reshape(-1, *energy.shape).sum(dim=0)
            # tanh' = 1 - tanh^2
            inner = torch.addcmul(wanted, found, tanh, value=-1, out=tanh).mul_(energy[:, None, None])
            to_q[..., rows, :] = inner.sum(dim=-2)
            to_k += inner.sum(dim=-3)
        return to_q, to_k, to_energy


def _slices(q: Tensor, k: Tensor) -> list[slice]:
    """Of the queries: as many at a time as `MAX_PAIR_ELEMENTS` allow."""
    size = max(1, MAX_PAIR_ELEMENTS // max(1, k.numel()))
    return [slice(first, min(first + size, q.shape[-2])) for first in range(0, q.shape[-2], size)]


def _room(q: Tensor, k: Tensor) -> Tensor:
    """One for all slices: the C library would give each a new place, and keep them all in the end."""
    return k.new_empty(max((rows.stop - rows.start for rows in _slices(q, k)), default=0) * k.numel())


def _as(room: Tensor, shape: Sequence[int]) -> Tensor:
    return room[: math.prod(shape)].view(*shape)


def _tanh(q: Tensor, k: Tensor, room: Tensor) -> Tensor:
    """Of each pair's sum, [..., num_heads, num_queries, num_keys, head_dim], in `room`."""
    pairs = _as(room, (*q.shape[:-1], *k.shape[-2:]))
    return torch.add(q.unsqueeze(-2), k.unsqueeze(-3), out=pairs).tanh_()


def softmax(scores: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of the keys that are `seen`; the rest is exactly 0. With `sinks` they sum to less than 1.

    scores: [..., num_heads, num_queries, num_keys]; seen: the same, or broadcastable to it.
    """
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


def visible(query_positions: Tensor, key_positions: Tensor, scores: Scores) -> Tensor:
    """Which keys each query sees: none of its future, and of its past what the window and the sinks leave.

    query_positions: [..., num_queries]; key_positions: [..., num_keys], negative where there is no key; returns
    [..., num_queries, num_keys].
    """
    q, k = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    seen = (k <= q) & (k >= 0)
    if scores.window is not None:
        seen &= (k > q - scores.window) | (k < scores.num_sink_tokens)
    return seen


def explicit_attention(scores: Scores, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(score(q, k)) v, step by step, in fp32: what no fused kernel computes. Differentiable.

    q: [..., num_heads, num_queries, head_dim]; k, v: [..., num_kv_heads, num_keys, head_dim]; seen: [..., num_queries,
    num_keys]. Returns the shape of q.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.float().repeat_interleave(group, dim=-3) for x in (k, v))
    weights = softmax(scores(q.float(), k), seen.unsqueeze(-3), scores.sinks)
    return weights @ v
