"""Computes a step: forward pass, then sampling. Never schedules."""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.engine.batch import Batch
from model.engine.forward import Forward, Forwarded
from model.engine.request import Request
from model.engine.scheduler import ScheduledStep
from model.sampling.logprobs import token_logprobs
from model.sampling.result import NOTHING, Sampled
from model.sampling.sampler import Sampler


class Runner:
    """What computes a decoder's forward pass, and the sampler's rows of those who run."""

    def __init__(self, compute: Forward) -> None:
        self.compute = compute
        config = compute.config
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, compute.pool.keys.device)

    def forget(self, departed: Iterable[Request]) -> None:
        """Free the sampler's rows of requests that are not running any more."""
        for request in departed:
            if request.sampler_row is not None:
                self.sampler.detach(request.sampler_row)
                request.sampler_row = None

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Forwarded:
        """Run the decoder over the step's tokens."""
        return self.compute.forward(batch)

    @torch.inference_mode()
    def sample(self, batch: Batch, step: ScheduledStep, forwarded: Forwarded) -> Sampled:
        """The next tokens of each request that samples, and the log-probabilities of prompts that are asked for."""
        self._score_prompts(step, forwarded.hidden)
        if not batch.sampling:
            return NOTHING
        rows = [self._sampler_row(request) for request in batch.sampling]
        positions, guesses = batch.sample_positions, batch.guesses
        sampled = self.sampler.sample(forwarded.logits, rows, positions, guesses, forwarded.likeliest)
        if batch.inspection is not None:
            sampled = sampled._replace(attention=batch.inspection.weights(self.compute.pool))
        return sampled

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
                    logits = self.compute.logits(rows)
                    request.prompt_logprobs += token_logprobs(logits, targets, [count] * len(targets))
            first += num_tokens
