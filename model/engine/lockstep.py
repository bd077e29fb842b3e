"""A forward pass by several processes: one leads, the others follow step by step, and know nothing of requests.

The leader has the engine: it schedules, stages and samples. Before each forward pass it sends the others what the pass
is about, a few arrays of whole numbers; then all of them compute, and meet inside the decoder (`model.split`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.batch import Batch, Samples
from model.engine.forward import Forward, Forwarded, choose_kernels
from model.engine.transfer import DirectTransfers, Transfers

STEP, LOGITS, END = range(3)  # what a message is about
REFUSED = -1  # in the place of the size of the cache: the leader has no engine
Arrays = Sequence[NDArray[np.int64]]


class Group(Protocol):
    """What the processes say to each other beside the decoder's own sums. rank 0 leads."""

    rank: int
    world_size: int

    def tell(self, arrays: Arrays) -> None:
        """The leader's message to all others."""
        ...

    def hear(self) -> Arrays:
        """Wait for the leader's next message."""
        ...

    def share(self, x: Tensor) -> None:
        """Fill a tensor of every follower with the leader's numbers."""
        ...


MakeForward = Callable[[Decoder, EngineConfig, int], Forward]


class LeadingForward:
    """A `Forward` that takes the others along."""

    def __init__(self, own: Forward, group: Group) -> None:
        self._own, self._group = own, group
        self.config, self.pool = own.config, own.pool
        self.samples_on_device, self.decodes = own.samples_on_device, own.decodes
        self.plan_arrays = own.plan_arrays

    def forward(self, batch: Batch) -> Forwarded:
        """See `Forward`."""
        plan = batch.plan
        kind = np.array([STEP, plan.num_decodes])
        of_plan = (plan.query_start_loc, plan.seq_lens, plan.block_tables, plan.slot_mapping)
        self._group.tell([kind, *batch.host_arrays, *of_plan])
        return self._own.forward(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward`."""
        self._group.tell([np.array([LOGITS, *hidden.shape])])
        hidden = hidden.contiguous()
        self._group.share(hidden)
        return self._own.logits(hidden)

    def dismiss(self) -> None:
        """Let the others go: no step follows."""
        self._group.tell([np.array([END])])


def lead(make: MakeForward, decoder: Decoder, config: EngineConfig, num_blocks: int, group: Group | None) -> Forward:
    """The forward pass of an engine: alone, or, at the head of a group, with as large a cache everywhere."""
    if group is None:
        return make(decoder, config, num_blocks)
    group.tell([np.array([num_blocks])])
    return LeadingForward(make(decoder, config, num_blocks), group)


@torch.inference_mode()
def follow(decoder: Decoder, config: EngineConfig, group: Group) -> None:
    """Compute this process's part of every step, until the leader says that there is no other, or cannot begin."""
    ((num_blocks,),) = group.hear()
    if num_blocks == REFUSED:
        return
    own: Forward = choose_kernels(decoder, config)(decoder, config, int(num_blocks))
    transfers = DirectTransfers(decoder.embedding.device)
    while True:
        kind, *arrays = group.hear()
        if kind[0] == END:
            return
        if kind[0] == LOGITS:
            hidden = decoder.embedding.new_empty(int(kind[1]), int(kind[2]))
            group.share(hidden)
            own.logits(hidden)
        else:
            own.forward(_batch(arrays, int(kind[1]), config.block_size, own, transfers))


def _batch(arrays: Arrays, num_decodes: int, block_size: int, own: Forward, transfers: Transfers) -> Batch:
    """The leader's batch, but for who is to be sampled for."""
    host, (query_start_loc, seq_lens, block_tables, slot_mapping) = arrays[:4], arrays[4:]
    plan = AttentionPlan(block_size, query_start_loc, seq_lens, block_tables, slot_mapping, num_decodes)
    token_ids, positions, prompt_lens, sample_rows, *plan_tensors = transfers.send([*host, *own.plan_arrays(plan)])
    return Batch(
        token_ids=token_ids,
        positions=positions,
        prompt_lens=prompt_lens,
        sample_rows=sample_rows,
        plan=plan,
        plan_tensors=plan_tensors,
        host_arrays=host,
        samples=Samples((), host[0][:0], host[0][:0], (), None),
        inspection=None,
    )
