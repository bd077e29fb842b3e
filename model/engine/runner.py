"""Computes a step: forward pass, then sampling. Never schedules."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.inspect import Inspection
from model.engine.batch import Batch, KeptRows, Samples, Unread, stage
from model.engine.decodes import Decodes
from model.engine.forward import Forward, Forwarded
from model.engine.request import Request
from model.engine.scheduled import ScheduledStep
from model.engine.tables import BlockTables
from model.engine.transfer import Transfers
from model.sampling.logprobs import token_logprobs
from model.sampling.result import NOTHING, Sampled
from model.sampling.sampler import Drawn, Sampler


@dataclass(frozen=True)
class Flight:
    """A step that has been launched. drawn, told: None where it samples nothing; else `told` waits for its ids."""

    step: ScheduledStep
    samples: Samples
    inspection: Inspection | None = None
    drawn: Drawn | None = None
    told: Callable[[], NDArray[np.int64]] | None = None

    @cached_property
    def unread(self) -> Unread | None:
        """What the next step may go on with before the host has seen it."""
        if self.drawn is None:
            return None
        return Unread({request: index for index, request in enumerate(self.samples.requests)}, self.drawn.token_ids)


class Runner:
    """What computes a decoder's forward pass, and what is kept of those who run: a row each, in the sampler and among
    the block tables.
    """

    def __init__(self, compute: Forward, transfers: Transfers) -> None:
        self.compute = compute
        self.transfers = transfers
        config = compute.config
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, compute.pool.keys.device)
        self._tables = BlockTables()

    def forget(self, departed: Iterable[Request]) -> None:
        """Free the rows of requests that are not running any more."""
        for request in departed:
            if request.row is not None:
                self.sampler.detach(request.row)
                self._tables.clear(request.row)
                request.row = None

    @torch.inference_mode()
    def stage(self, step: ScheduledStep, block_size: int, before: Flight | None) -> Batch | Decodes:
        """Lay out a step on the device. before: the step that is still on its way, if one is."""
        kept = KeptRows([self._row_of(request) for request, *_ in step.requests], self._tables)
        unread, compute = None if before is None else before.unread, self.compute
        if compute.decodes is not None:
            decodes = compute.decodes.stage(step, kept, self.sampler, self.transfers, unread)
            if decodes is not None:
                return decodes
        sampler = self.sampler if compute.samples_on_device else None
        return stage(step, kept, sampler, block_size, self.transfers, compute.plan_arrays, unread)

    @torch.inference_mode()
    def forward(self, batch: Batch | Decodes) -> Forwarded:
        """Run the decoder over the step's tokens."""
        if isinstance(batch, Batch):
            return self.compute.forward(batch)
        company = batch.company
        company.replay()
        return Forwarded(company.outputs.hidden, company.outputs.logits, drawn=company.drawn)

    @torch.inference_mode()
    def sample(self, batch: Batch | Decodes, step: ScheduledStep, forwarded: Forwarded) -> Flight:
        """Draw the next token of each request that samples, and begin to bring it to the host."""
        self._score_prompts(step, forwarded.hidden)
        samples, drawn = batch.samples, forwarded.drawn
        inspection = batch.inspection if isinstance(batch, Batch) else None
        if not samples.requests:
            return Flight(step, samples)
        if drawn is None:
            _, rows, positions, guesses, asked = samples
            drawn = self.sampler.draw(forwarded.logits, rows, positions, guesses, forwarded.likeliest, asked)
        return Flight(step, samples, inspection, drawn, self.transfers.fetch(drawn.told))

    @torch.inference_mode()
    def read(self, flight: Flight) -> Sampled:
        """Wait for a step and tell what it gave: next tokens, and what else was asked for."""
        if flight.drawn is None or flight.told is None:
            return NOTHING
        sampled = self.sampler.tell(flight.drawn, flight.told().tolist())
        inspection = flight.inspection
        return sampled if inspection is None else sampled._replace(attention=inspection.weights(self.compute.pool))

    def _row_of(self, request: Request) -> int:
        if request.row is None:
            params, prompt = request.params, request.num_prompt_tokens
            request.row = self.sampler.attach(params, request.token_ids, prompt, request.grammar)
        return request.row

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
