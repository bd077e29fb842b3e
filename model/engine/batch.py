"""From a scheduled step to the tensors that the runner reads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.attention.plan import AttentionPlan, token_positions
from model.engine.scheduler import ScheduledStep
from model.sampling.sampler import SamplingRows


@dataclass(frozen=True)
class Batch:
    """One step on the device. Rows are the new tokens of all sequences, decodes first.

    token_ids, positions: [num_tokens].
    sample_rows: [num_sampled]: the row whose logits give each sampling request's next token.
    sampling: the parameters of those rows; None where no request has come to its last token.
    """

    token_ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    sample_rows: Tensor
    sampling: SamplingRows | None


def decodes_first(step: ScheduledStep) -> ScheduledStep:
    """The same step with single-token requests in front, as attention wants them. Order is otherwise kept."""
    return ScheduledStep(tuple(sorted(step.requests, key=lambda scheduled: scheduled.num_tokens > 1)))


def stage(step: ScheduledStep, block_size: int, device: torch.device) -> Batch:
    """Lay out a step, already with its decodes first."""
    starts = [start for _, start, _, _ in step.requests]
    counts = [num_tokens for _, _, num_tokens, _ in step.requests]
    token_ids = [t for request, start, n, _ in step.requests for t in request.token_ids[start : start + n]]
    plan = AttentionPlan.build(block_size, starts, counts, [request.block_table for request, *_ in step.requests])
    samples = np.array([samples for *_, samples in step.requests])
    sampling = [scheduled.request for scheduled in step.requests if scheduled.samples]
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.from_numpy(token_positions(starts, plan.query_start_loc)).to(device),
        plan=plan,
        sample_rows=torch.from_numpy(plan.query_start_loc[1:][samples] - 1).to(device),
        sampling=SamplingRows.stage([r.params for r in sampling], [r.num_tokens for r in sampling], device)
        if sampling
        else None,
    )
