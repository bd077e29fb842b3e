"""Computes a step: forward pass, then sampling. Never schedules."""

import torch

from model.attention.gathered import GatheredAttention
from model.cache.pool import KVPool
from model.decoder import Decoder
from model.engine.batch import Batch
from model.sampling.sampler import sample


class Runner:
    """A decoder and its cache."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self.decoder, self.pool = decoder, pool

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int]:
        """The next token of each request that samples, in the batch's order."""
        hidden = self.decoder(batch.token_ids, batch.positions, GatheredAttention(batch.plan, self.pool))
        if batch.sampling is None:
            return []
        # The head is the widest product of all: only rows that sample go through it.
        logits = self.decoder.logits(hidden[batch.sample_rows])
        next_ids: list[int] = sample(logits, batch.sampling).tolist()
        return next_ids
