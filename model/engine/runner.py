"""Computes a step: forward pass, then sampling. Never schedules."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.deterministic import DeterministicAttention
from model.attention.gathered import GatheredAttention
from model.cache.pool import KVPool
from model.decoder import Decoder
from model.engine.batch import Batch
from model.engine.request import Request
from model.engine.scheduler import ScheduledStep
from model.sampling.logprobs import token_logprobs
from model.sampling.result import NOTHING, Sampled
from model.sampling.sampler import Sampler


class Forwarded(NamedTuple):
    """hidden: final states of the step's tokens, [num_tokens, hidden_size]; logits: [num_samples, vocab_size]."""

    hidden: Tensor
    logits: Tensor


class Runner:
    """A decoder, its cache, and the sampler's rows of those who run."""

    def __init__(self, decoder: Decoder, pool: KVPool, *, deterministic: bool = False) -> None:
        self.decoder, self.pool = decoder, pool
        self._attention = DeterministicAttention if deterministic else GatheredAttention
        config = decoder.config
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, pool.keys.device)

    def forget(self, departed: Iterable[Request]) -> None:
        """Free the sampler's rows of requests that are not running any more."""
        for request in departed:
            if request.sampler_row is not None:
                self.sampler.detach(request.sampler_row)
                request.sampler_row = None

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Forwarded:
        """Run the decoder over the step's tokens."""
        attention = self._attention(batch.plan, self.pool)
        hidden = self.decoder(batch.token_ids, batch.positions, attention, batch.prompt_lens)
        # The head is the widest product of all: only rows that sample go through it.
        return Forwarded(hidden, self.decoder.logits(hidden[batch.sample_rows]))

    @torch.inference_mode()
    def sample(self, batch: Batch, step: ScheduledStep, forwarded: Forwarded) -> Sampled:
        """The next tokens of each request that samples, and the log-probabilities of prompts that are asked for."""
        self._score_prompts(step, forwarded.hidden)
        if not batch.sampling:
            return NOTHING
        rows = [self._sampler_row(request) for request in batch.sampling]
        return self.sampler.sample(forwarded.logits, rows, batch.sample_positions, batch.guesses)

    def _sampler_row(self, request: Request) -> int:
        if request.sampler_row is None:
            request.sampler_row = self.sampler.attach(
                request.params, request.token_ids, request.num_prompt_tokens, request.grammar
            )
        return request.sampler_row

    def _score_prompts(self, step: ScheduledStep, hidden: Tensor) -> None:
        first = 0
        for request, start, num_tokens, *_ in step.requests:
            if request.wants_prompt_logprobs:
                # Row r of the chunk predicts prompt token start + r + 1; those before a preemption are known already.
                known = len(request.prompt_logprobs)
                stop = min(start + num_tokens + 1, request.num_prompt_tokens)
                if known < stop:
                    rows = hidden[first + known - 1 - start : first + stop - 1 - start]
                    targets = torch.tensor(request.token_ids[known:stop], device=hidden.device)
                    count = request.params.prompt_logprobs or 0
                    logits = self.decoder.logits(rows)
                    request.prompt_logprobs += token_logprobs(logits, targets, [count] * len(targets))
            first += num_tokens
