"""Turns a batch of logits into token ids: every row by its own parameters, none of them by its neighbours.

Randomness is counter-based: one uniform number for each (seed, position), turned into a token by the inverse of the
row's cumulative distribution. Nothing is drawn from a generator with a state, so batching, preemption and resumption
elsewhere cannot change what a request says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling.params import SamplingParams


@dataclass(frozen=True)
class SamplingRows:
    """The parameters of the rows to sample, as tensors of [rows].

    uniforms: one number in [0, 1) a row, float64.
    all_greedy, truncates: facts about the whole batch, known on the host so that no step waits for the device.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniforms: Tensor
    all_greedy: bool
    truncates: bool

    @classmethod
    def stage(cls, params: Sequence[SamplingParams], positions: Sequence[int], device: torch.device) -> "SamplingRows":
        """positions: for each row, the position of the token to be sampled."""
        temperature = np.array([p.temperature for p in params], dtype=np.float32)
        top_k = np.array([p.top_k for p in params], dtype=np.int64)
        top_p = np.array([p.top_p for p in params], dtype=np.float32)
        seeds = np.array([p.seed & _MASK_64 for p in params], dtype=np.uint64)
        uniforms = keyed_uniforms(seeds, np.asarray(positions, dtype=np.uint64))
        return cls(
            temperature=torch.from_numpy(temperature).to(device),
            top_k=torch.from_numpy(top_k).to(device),
            top_p=torch.from_numpy(top_p).to(device),
            uniforms=torch.from_numpy(uniforms).to(device),
            all_greedy=not temperature.any(),
            truncates=bool((top_k > 0).any() or (top_p < 1).any()),
        )


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits: [rows, vocab_size] -> token ids, [rows] int64."""
    greedy = logits.argmax(dim=-1)
    if rows.all_greedy:
        return greedy
    scaled = logits.float() / torch.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    if rows.truncates:
        scaled = truncate(scaled, rows.top_k, rows.top_p)
    # Ids keep their order, truncated or not, so that a row's draw does not depend on what other rows ask for.
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = rows.uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return torch.where(rows.temperature > 0, drawn, greedy)


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what lies outside each row's top k, then outside its nucleus (Holtzman et al. 2020).

    logits: [rows, vocab_size], already divided by the temperature; top_k 0 and top_p 1 keep everything. Tokens that tie
    with the last one kept are kept too.
    """
    ordered, _ = logits.sort(dim=-1, descending=True)
    last = (torch.where(top_k > 0, top_k, logits.shape[-1]) - 1).clamp(max=logits.shape[-1] - 1)
    kth = ordered.gather(-1, last[:, None])
    probabilities = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The first token whose predecessors already hold top_p is out; its neighbour to the left sets the bar.
    kept = ((before < top_p[:, None]) | (top_p[:, None] >= 1)).sum(dim=-1, keepdim=True)
    nucleus = ordered.gather(-1, kept - 1)
    return logits.masked_fill(logits < torch.maximum(kth, nucleus), -torch.inf)


_MASK_64 = (1 << 64) - 1


def keyed_uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): two rounds of the SplitMix64 finalizer (Steele et al. 2014)."""
    mixed = _splitmix64(_splitmix64(seeds) + positions)
    # 48 bits: enough for any vocabulary, and u * total can never round up to total.
    return (mixed >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
