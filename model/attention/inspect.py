"""Where a token looked when the next one was chosen: softmax weights of single rows, for those who ask to see them.

Fused kernels never write the weights down, so they are computed again for the rows asked about: from the very queries
that attention was given, and from the keys as the cache holds them. In a step in which nobody asks, nothing of this
runs.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.attention.scores import Attend, Scores, softmax, visible
from model.attention.weights import AttentionRequest, HeadWeights, TokenAttention
from model.cache.packed import PackedPool
from model.cache.pool import KVPool


class Inspection:
    """What is asked of one step, and the queries that were kept for it.

    asked: by sample, of the step's `sample_rows`, what is to be shown of it.
    layers, samples, rows: those asked about.
    """

    def __init__(
        self, plan: AttentionPlan, sample_rows: NDArray[np.int64], asked: Mapping[int, AttentionRequest]
    ) -> None:
        self.layers = frozenset(layer for request in asked.values() for layer in request.layers)
        self.samples = list(asked)
        self.rows: list[int] = sample_rows[self.samples].tolist()
        self._plan, self._asked, self._num_samples = plan, asked, len(sample_rows)
        self._queries: dict[int, tuple[Scores, Tensor]] = {}

    def around(self, attend: Callable[[Scores, Tensor, Tensor, Tensor], Tensor]) -> Attend:
        """The same attention, and the queries asked about are kept as they pass. It is given q: [num_tokens, ...]."""

        def inspected(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if scores.layer in self.layers:
                self.keep(scores, q[self.rows])
            return attend(scores, q, k, v)

        return inspected

    def keep(self, scores: Scores, queries: Tensor) -> None:
        """Queries of `rows` as one layer's attention took them, [len(rows), num_heads, head_dim]."""
        self._queries[scores.layer] = scores, queries

    def weights(self, pool: KVPool | PackedPool) -> list[TokenAttention | None]:
        """For each sample what was asked for. Call when the step's keys are stored, and before its blocks are freed."""
        found: list[TokenAttention | None] = [None] * self._num_samples
        for index, (sample, request) in enumerate(self._asked.items()):
            slots, shown = torch.from_numpy(self._slots(self.rows[index])), []
            for layer in request.layers:
                scores, queries = self._queries[layer]
                rows = newest_row_weights(scores, queries[index], request.heads, pool, slots.to(queries.device))
                shown += [
                    HeadWeights(layer, head, *_shown(weights, request.top_k))
                    for head, weights in zip(request.heads, rows, strict=True)
                ]
            found[sample] = shown
        return found

    def _slots(self, row: int) -> NDArray[np.int64]:
        """Those of everything that the row's sequence holds up to this row."""
        plan = self._plan
        sequence = int(plan.query_start_loc.searchsorted(row, side="right")) - 1
        after = int(plan.query_start_loc[sequence + 1]) - 1 - row
        positions = np.arange(plan.seq_lens[sequence] - after)
        return plan.slots(sequence, positions[None]).ravel()


def newest_row_weights(
    scores: Scores, q: Tensor, heads: Sequence[int], pool: KVPool | PackedPool, slots: Tensor
) -> Tensor:
    """One token's softmax weights over all up to itself, [len(heads), length], in fp32.

    q: [num_heads, head_dim], as attention took it; slots: [length], where the cache holds those tokens, its own last.
    """
    keys, _ = pool.gather(scores.layer, slots)
    group_size = len(q) // keys.shape[1]
    k = keys[:, [head // group_size for head in heads]].float().transpose(0, 1)  # [len(heads), length, head_dim]
    positions = torch.arange(len(slots), device=q.device)
    seen = visible(positions[-1:], positions, scores)
    sinks = None if scores.sinks is None else scores.sinks[list(heads)]
    return softmax(scores(q[list(heads), None].float(), k, heads), seen, sinks)[:, 0]


def _shown(weights: Tensor, top_k: int | None) -> tuple[list[int], list[float]]:
    """weights: [length] of one head. Positions and their weights."""
    if top_k is None:
        return list(range(len(weights))), weights.tolist()
    top = weights.topk(min(top_k, len(weights)))
    some = int((top.values > 0).sum())
    return top.indices[:some].tolist(), top.values[:some].tolist()
