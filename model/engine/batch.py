"""From a scheduled step to the tensors that the runner reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from model.attention.inspect import Inspection
from model.attention.plan import AttentionPlan, token_positions
from model.engine.request import Request
from model.engine.scheduler import ScheduledStep


@dataclass(frozen=True)
class Batch:
    """One step on the device. Rows are the new tokens of all sequences, decodes first.

    token_ids, positions, prompt_lens: [num_tokens]; the last is how long the prompt of each token's request is.
    sample_rows: [num_samples]: the rows whose logits give tokens: of each sampling request the last ones.
    sampling: the request of each sample; sample_positions: where the sampled token will stand; guesses: what the
        request's next sample takes it to be, None for the last one.
    inspection: None unless someone asks to see attention weights of this step.
    """

    token_ids: Tensor
    positions: Tensor
    prompt_lens: Tensor
    plan: AttentionPlan
    sample_rows: Tensor
    sampling: Sequence[Request]
    sample_positions: Sequence[int]
    guesses: Sequence[int | None]
    inspection: Inspection | None


def decodes_first(step: ScheduledStep) -> ScheduledStep:
    """The same step with single-token requests in front, as attention wants them. Order is otherwise kept."""
    return ScheduledStep(tuple(sorted(step.requests, key=lambda scheduled: scheduled.num_tokens > 1)))


def stage(step: ScheduledStep, block_size: int, device: torch.device) -> Batch:
    """Lay out a step, already with its decodes first."""
    scheduled = step.requests
    starts = [item.start for item in scheduled]
    counts = [item.num_tokens for item in scheduled]
    token_ids = list(
        chain.from_iterable(
            chain(item.request.token_ids[item.start : item.start + item.num_tokens], item.draft_ids)
            for item in scheduled
        )
    )
    plan = AttentionPlan.build(block_size, starts, counts, [item.request.block_table for item in scheduled])
    samples = np.array([item.num_samples for item in scheduled])
    # Row i of a request's samples lies so far before the end of its rows.
    ends = np.repeat(plan.query_start_loc[1:], samples)
    before_end = np.repeat(samples.cumsum(), samples) - np.arange(samples.sum())
    positions = token_positions(starts, plan.query_start_loc)
    sample_rows = ends - before_end
    sampling = [item.request for item in scheduled for _ in range(item.num_samples)]
    asked = {i: request.attention for i, request in enumerate(sampling) if request.attention is not None}
    prompt_lens = np.repeat([item.request.num_prompt_tokens for item in scheduled], counts)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.from_numpy(positions).to(device),
        prompt_lens=torch.from_numpy(prompt_lens).to(device),
        plan=plan,
        sample_rows=torch.from_numpy(sample_rows).to(device),
        sampling=sampling,
        guesses=[guess for item in scheduled if item.num_samples for guess in (*item.draft_ids, None)],
        sample_positions=(positions[sample_rows] + 1).tolist(),
        inspection=Inspection(plan, sample_rows, asked) if asked else None,
    )
