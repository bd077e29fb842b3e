"""From a scheduled step to the tensors that the runner reads: laid out on the host, sent to the device in one copy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.attention.inspect import Inspection
from model.attention.plan import AttentionPlan, token_positions
from model.engine.request import Request
from model.engine.scheduled import ScheduledRequest, ScheduledStep
from model.engine.transfer import Transfers

PlanArrays = Callable[[AttentionPlan], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Batch:
    """One step on the device. Rows are the new tokens of all sequences, decodes first.

    token_ids, positions, prompt_lens: [num_tokens]; the last is how long the prompt of each token's request is.
    sample_rows: [num_samples]: the rows whose logits give tokens: of each sampling request the last ones.
    sampling: the request of each sample; sample_positions: where the sampled token will stand; guesses: what the
        request's next sample takes it to be, None for the last one.
    sampler_rows, sampler_positions: [num_samples], on the device: each sample's row in the sampler, and its position.
    plan_tensors: what the forward pass wants of the plan, on the device.
    host_arrays: token_ids, positions, prompt_lens and sample_rows once more, as they were on the host.
    inspection: None unless someone asks to see attention weights of this step.
    """

    token_ids: Tensor
    positions: Tensor
    prompt_lens: Tensor
    plan: AttentionPlan
    plan_tensors: Sequence[Tensor]
    host_arrays: Sequence[NDArray[np.int64]]
    sample_rows: Tensor
    sampling: Sequence[Request]
    sample_positions: Sequence[int]
    guesses: Sequence[int | None]
    sampler_rows: Tensor
    sampler_positions: Tensor
    inspection: Inspection | None


@dataclass(frozen=True)
class Unread:
    """Tokens that the step before is sampling. places: of each request that samples; token_ids: on the device."""

    places: Mapping[Request, int]
    token_ids: Tensor


def decodes_first(step: ScheduledStep) -> ScheduledStep:
    """The same step with single-token requests in front, as attention wants them. Order is otherwise kept."""
    return ScheduledStep(tuple(sorted(step.requests, key=lambda scheduled: scheduled.num_tokens > 1)))


def stage(
    step: ScheduledStep, block_size: int, transfers: Transfers, plan_arrays: PlanArrays, unread: Unread | None
) -> Batch:
    """Lay out a step, already with its decodes first. Its sampling requests have their rows in the sampler.

    plan_arrays: what the forward pass wants of the plan. unread: of the step before, if it is still on its way.
    """
    scheduled = step.requests
    starts = [item.start for item in scheduled]
    counts = [item.num_tokens for item in scheduled]
    token_ids = np.fromiter(chain.from_iterable(_known_tokens(item) for item in scheduled), np.int64, sum(counts))
    plan = AttentionPlan.build(block_size, starts, counts, [item.request.block_table for item in scheduled])
    positions = token_positions(starts, plan.query_start_loc)
    sample_rows = _sample_rows(scheduled, plan)
    sampling = [item.request for item in scheduled for _ in range(item.num_samples)]
    asked = {i: request.attention for i, request in enumerate(sampling) if request.attention is not None}
    prompt_lens = np.repeat([item.request.num_prompt_tokens for item in scheduled], counts)
    sample_positions = positions[sample_rows] + 1
    sampler_rows = np.array([request.sampler_row for request in sampling], dtype=np.int64)
    of_tokens, of_samples = (token_ids, positions, prompt_lens), (sample_rows, sampler_rows, sample_positions)
    rows, places = _unread(scheduled, plan, unread)
    sent = transfers.send([*of_tokens, *of_samples, rows, places, *plan_arrays(plan)])
    if unread is not None and len(rows):
        sent[0][sent[6]] = unread.token_ids[sent[7]]
    return Batch(
        token_ids=sent[0],
        positions=sent[1],
        prompt_lens=sent[2],
        plan=plan,
        plan_tensors=sent[8:],
        host_arrays=(*of_tokens, sample_rows),
        sample_rows=sent[3],
        sampling=sampling,
        guesses=[guess for item in scheduled if item.num_samples for guess in (*item.draft_ids, None)],
        sample_positions=sample_positions.tolist(),
        sampler_rows=sent[4],
        sampler_positions=sent[5],
        inspection=Inspection(plan, sample_rows, asked) if asked else None,
    )


def _known_tokens(item: ScheduledRequest) -> Sequence[int]:
    """The tokens that a request computes; 0 in the place of one that is still on its way."""
    if item.is_unread:
        return (0,)
    known = item.request.token_ids[item.start : item.start + item.num_tokens]
    return [*known, *item.draft_ids] if item.draft_ids else known


def _sample_rows(scheduled: Sequence[ScheduledRequest], plan: AttentionPlan) -> NDArray[np.int64]:
    """Of each request that samples the last rows, one a sample."""
    samples = np.array([item.num_samples for item in scheduled])
    # Row i of a request's samples lies so far before the end of its rows.
    before_end = np.repeat(samples.cumsum(), samples) - np.arange(samples.sum())
    rows: NDArray[np.int64] = np.repeat(plan.query_start_loc[1:], samples) - before_end
    return rows


def _unread(
    scheduled: Sequence[ScheduledRequest], plan: AttentionPlan, unread: Unread | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows whose tokens are still on their way, and where each of them is in what the last step draws."""
    pending = [index for index, item in enumerate(scheduled) if item.is_unread]
    places = [unread.places[scheduled[index].request] for index in pending] if unread else []
    return plan.query_start_loc[pending], np.array(places, dtype=np.int64)
