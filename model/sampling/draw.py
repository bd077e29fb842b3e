"""From logits to one token a row: truncation, then the inverse of the cumulative distribution at a keyed number.

Randomness is counter-based: one uniform number for each (seed, position). Nothing is drawn from a generator with a
state, so batching, preemption and resumption elsewhere cannot change what a request says.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token id a row, and whether the row was one of numbers: (ids [rows], usable [rows] bool).

    logits: [rows, vocab_size], -inf where a token is out; uniforms: [rows], float64 in [0, 1).
    Ids keep their order, truncated or not, so that a row's draw does not depend on what other rows ask for. The
    cumulative distribution is taken over blocks of ids first and then inside the one block that is hit: of 128 rows of
    a vocabulary of 49,152 a cumulative sum of all took half of the whole sampling.
    """
    probabilities = logits.softmax(dim=-1)
    if padding := -logits.shape[-1] % BLOCK:
        probabilities = F.pad(probabilities, (0, padding))
    probabilities = probabilities.unflatten(-1, (-1, BLOCK))
    sums = probabilities.sum(dim=-1).double()
    block, target = _invert(sums, uniforms * sums.sum(dim=-1))
    hit = probabilities.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)
    token, _ = _invert(hit.double(), target)
    return block * BLOCK + token, sums.sum(dim=-1).isfinite()


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of a row's weights passes its target, and how much of the target is left there.

    weights: [rows, n] float64, target: [rows]. Rounding can put the target at the very end: then it is the last entry
    with any weight. A row that is not of numbers gives its first entry.
    """
    cumulative = weights.cumsum(dim=-1)
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    index = torch.minimum(torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1), last)
    before = (cumulative - weights).gather(-1, index[:, None]).squeeze(1)
    return index, target - before


CANDIDATES = 512


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what lies outside each row's top k, then outside its nucleus (Holtzman et al. 2020).

    logits: [rows, vocab_size], already divided by the temperature; top_k 0 and top_p 1 keep everything. Tokens that tie
    with the last one kept are kept too. A row whose bar lies among its likeliest 512 tokens is not sorted as a whole,
    which for 32 rows of a vocabulary of 49,152 takes 41 ms.
    """
    bar, found = _lowest_kept(logits, top_k, top_p, CANDIDATES)
    if not found.all():
        rest = (~found).nonzero().flatten()
        bar[rest], _ = _lowest_kept(logits[rest], top_k[rest], top_p[rest], logits.shape[-1])
    return logits.masked_fill(logits < bar, -torch.inf)


def _lowest_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The lowest logit that each row keeps, [rows, 1], and whether the likeliest `count` tokens were enough to know."""
    vocab_size = logits.shape[-1]
    count = min(count, vocab_size)
    likeliest = logits.topk(count, dim=-1).values
    limits = top_k > 0
    kth = likeliest.gather(-1, (top_k - 1).clamp(0, count - 1)[:, None])
    kth = torch.where(limits[:, None], kth, -torch.inf)
    total = logits.masked_fill(logits < kth, -torch.inf).logsumexp(dim=-1, keepdim=True)
    probabilities = (likeliest - total).exp()
    cumulative = probabilities.cumsum(dim=-1)
    # A token is out when those before it already hold top_p; the last one that is in sets the bar.
    kept = (cumulative - probabilities < top_p[:, None]).sum(dim=-1, keepdim=True)
    nucleus = likeliest.gather(-1, (kept - 1).clamp(min=0))  # a row of NaN keeps nothing; `draw` reports it
    nucleus = torch.where(top_p[:, None] < 1, nucleus, -torch.inf)
    enough = torch.where(limits, top_k <= count, (top_p >= 1) | (cumulative[:, -1] >= top_p))
    return torch.maximum(kth, nucleus), enough | (count == vocab_size)


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
