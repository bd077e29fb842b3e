"""From logits to one token a row: truncation, then the inverse of the cumulative distribution at a keyed number.

Randomness is counter-based: one uniform number for each (seed, position). Nothing is drawn from a generator with a
state, so batching, preemption and resumption elsewhere cannot change what a request says.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token id a row. logits: [rows, vocab_size], -inf where a token is out; uniforms: [rows], float64 in [0, 1).

    Ids keep their order, truncated or not, so that a row's draw does not depend on what other rows ask for.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what lies outside each row's top k, then outside its nucleus (Holtzman et al. 2020).

    logits: [rows, vocab_size], already divided by the temperature; top_k 0 and top_p 1 keep everything. Tokens that tie
    with the last one kept are kept too.
    """
    vocab_size = logits.shape[-1]
    ordered, _ = logits.sort(dim=-1, descending=True)
    last = (torch.where(top_k > 0, top_k, vocab_size) - 1).clamp(max=vocab_size - 1)
    kth = ordered.gather(-1, last[:, None])
    probabilities = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A token is out when those before it already hold top_p; the last one that is in sets the bar.
    kept = ((before < top_p[:, None]) | (top_p[:, None] >= 1)).sum(dim=-1, keepdim=True)
    nucleus = ordered.gather(-1, kept - 1)
    return logits.masked_fill(logits < torch.maximum(kth, nucleus), -torch.inf)


def drop_unlikely(logits: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what is less than `min_p` times as likely as the row's likeliest token (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None], -torch.inf)


def keyed_uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): two rounds of SplitMix64 (Steele et al. 2014)."""
    mixed = _splitmix64(_splitmix64(seeds) + positions)
    # 48 bits: enough for any vocabulary, and u * total can never round up to total.
    return (mixed >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
