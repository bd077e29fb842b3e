"""Computes a step: forward pass, then sampling. Never schedules."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.engine.batch import Batch, Unread, stage
from model.engine.forward import Forward, Forwarded
from model.engine.request import Request
from model.engine.scheduled import ScheduledStep
from model.engine.transfer import Transfers
from model.sampling.logprobs import token_logprobs
from model.sampling.result import NOTHING, Sampled
from model.sampling.sampler import Drawn, Sampler


@dataclass(frozen=True)
class Flight:
    """A step that has been launched. drawn, told: None where it samples nothing; else `told` waits for its ids."""

    step: ScheduledStep
    batch: Batch
    drawn: Drawn | None = None
    told: Callable[[], Tensor] | None = None

    @cached_property
    def unread(self) -> Unread | None:
        """What the next step may go on with before the host has seen it."""
        if self.drawn is None:
            return None
        return Unread({request: index for index, request in enumerate(self.batch.sampling)}, self.drawn.token_ids)


class Runner:
    """What computes a decoder's forward pass, and the sampler's rows of those who run."""

    def __init__(self, compute: Forward, transfers: Transfers) -> None:
        self.compute = compute
        self.transfers = transfers
        config = compute.config
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, compute.pool.keys.device)

    def forget(self, departed: Iterable[Request]) -> None:
        """Free the sampler's rows of requests that are not running any more."""
        for request in departed:
            if request.sampler_row is not None:
                self.sampler.detach(request.sampler_row)
                request.sampler_row = None

    @torch.inference_mode()
    def stage(self, step: ScheduledStep, block_size: int, before: Flight | None) -> Batch:
        """Lay out a step on the device. before: the step that is still on its way, if one is."""
        for scheduled in step.requests:
            request = scheduled.request
            if scheduled.num_samples and request.sampler_row is None:
                request.sampler_row = self.sampler.attach(
                    request.params, request.token_ids, request.num_prompt_tokens, request.grammar
                )
        unread = None if before is None else before.unread
        return stage(step, block_size, self.transfers, self.compute.plan_arrays, unread)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Forwarded:
        """Run the decoder over the step's tokens."""
        return self.compute.forward(batch)

    @torch.inference_mode()
    def sample(self, batch: Batch, step: ScheduledStep, forwarded: Forwarded) -> Flight:
        """Draw the next token of each request that samples, and begin to bring it to the host."""
        self._score_prompts(step, forwarded.hidden)
        if not batch.sampling:
            return Flight(step, batch)
        rows = [request.sampler_row for request in batch.sampling if request.sampler_row is not None]
        keys = (batch.sampler_rows, batch.sampler_positions) if self.compute.samples_on_device else None
        positions, guesses = batch.sample_positions, batch.guesses
        drawn = self.sampler.draw(forwarded.logits, rows, positions, guesses, forwarded.likeliest, keys)
        return Flight(step, batch, drawn, self.transfers.fetch(drawn.told))

    @torch.inference_mode()
    def read(self, flight: Flight) -> Sampled:
        """Wait for a step and tell what it gave: next tokens, and what else was asked for."""
        if flight.drawn is None or flight.told is None:
            return NOTHING
        sampled = self.sampler.tell(flight.drawn, flight.told().tolist())
        inspection = flight.batch.inspection
        return sampled if inspection is None else sampled._replace(attention=inspection.weights(self.compute.pool))

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
