"""From a scheduled step to the tensors that the runner reads: laid out on the host, sent to the device in one copy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.attention.inspect import Inspection
from model.attention.plan import AttentionPlan, token_positions
from model.engine.request import Request
from model.engine.scheduled import ScheduledRequest, ScheduledStep
from model.engine.tables import BlockTables
from model.engine.transfer import Transfers
from model.sampling.sampler import Asked, Sampler

PlanArrays = Callable[[AttentionPlan], Sequence[NDArray[Any]]]


class Samples(NamedTuple):
    """What a step samples: an entry for each token.

    requests: whose it is; rows, positions: [num_samples], on the host, the request's row in the sampler and where the
        token will stand; guesses: what the request's next sample takes it to be, None for the last one.
    asked: what each one's request asks for, on the device; None where nothing is sampled there.
    """

    requests: Sequence[Request]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    guesses: Sequence[int | None]
    asked: Asked | None


@dataclass(frozen=True)
class Batch:
    """One step on the device. Rows are the new tokens of all sequences, decodes first.

    token_ids, positions, prompt_lens: [num_tokens]; the last is how long the prompt of each token's request is.
    sample_rows: [num_samples]: the rows whose logits give tokens: of each sampling request the last ones.
    plan_tensors: what the forward pass wants of the plan, on the device.
    host_arrays: token_ids, positions, prompt_lens and sample_rows once more, as they were on the host.
    inspection: None unless someone asks to see attention weights of this step.
    """

    token_ids: Tensor
    positions: Tensor
    prompt_lens: Tensor
    sample_rows: Tensor
    plan: AttentionPlan
    plan_tensors: Sequence[Tensor]
    host_arrays: Sequence[NDArray[np.int64]]
    samples: Samples
    inspection: Inspection | None


class KeptRows(NamedTuple):
    """What is kept of requests from step to step. rows: of the step's requests, each its own."""

    rows: Sequence[int]
    tables: BlockTables


@dataclass(frozen=True)
class Unread:
    """Tokens that the step before is sampling. places: of each request that samples; token_ids: on the device."""

    places: Mapping[Request, int]
    token_ids: Tensor


def decodes_first(step: ScheduledStep) -> ScheduledStep:
    """The same step with single-token requests in front, as attention wants them. Order is otherwise kept."""
    decodes = [scheduled for scheduled in step.requests if scheduled.num_tokens == 1]
    if len(decodes) == len(step.requests):
        return step
    return ScheduledStep((*decodes, *(scheduled for scheduled in step.requests if scheduled.num_tokens > 1)))


def stage(
    step: ScheduledStep,
    kept: KeptRows,
    sampler: Sampler | None,
    block_size: int,
    transfers: Transfers,
    plan_arrays: PlanArrays,
    unread: Unread | None,
) -> Batch:
    """Lay out a step, already with its decodes first.

    sampler: None where the device does not sample. plan_arrays: what the forward pass wants of the plan. unread: of the
    step before, if it is still on its way.
    """
    requests, starts, counts, drafts, samples, _ = zip(*step.requests, strict=True)
    block_tables = kept.tables.of(kept.rows, [request.block_table for request in requests])
    plan = AttentionPlan.of(block_size, starts, counts, block_tables)
    _, positions, _, sample_rows = of_tokens = _of_tokens(step, plan)
    sampling = [request for request, count in zip(requests, samples, strict=True) for _ in range(count)]
    sampler_rows, sample_positions = np.repeat(kept.rows, samples), positions[sample_rows] + 1
    asked = sampler.asked(sampler_rows, sample_positions) if sampler is not None and sampling else []
    of_plan = plan_arrays(plan)
    sent = iter(transfers.send([*of_tokens, *_unread(step.requests, plan, unread), *of_plan, *asked]))
    token_ids_there, positions_there, prompt_lens_there, sample_rows_there, rows, places = islice(sent, 6)
    if unread is not None and len(rows):
        token_ids_there[rows] = unread.token_ids[places]
    return Batch(
        token_ids=token_ids_there,
        positions=positions_there,
        prompt_lens=prompt_lens_there,
        sample_rows=sample_rows_there,
        plan=plan,
        plan_tensors=list(islice(sent, len(of_plan))),
        host_arrays=of_tokens,
        samples=Samples(
            sampling,
            sampler_rows,
            sample_positions,
            [guess for ids, count in zip(drafts, samples, strict=True) if count for guess in (*ids, None)],
            Asked(*sent) if asked else None,
        ),
        inspection=_inspection(plan, sample_rows, sampling),
    )


def _of_tokens(step: ScheduledStep, plan: AttentionPlan) -> tuple[NDArray[np.int64], ...]:
    """`token_ids`, `positions`, `prompt_lens` and `sample_rows` of the batch, on the host."""
    requests, starts, counts, _, samples, _ = zip(*step.requests, strict=True)
    token_ids = np.array(_known_tokens(step.requests, plan.num_decodes), dtype=np.int64)
    prompt_lens = np.repeat([request.num_prompt_tokens for request in requests], counts)
    return token_ids, token_positions(starts, plan.query_start_loc), prompt_lens, _sample_rows(samples, plan)


def _known_tokens(scheduled: Sequence[ScheduledRequest], num_decodes: int) -> list[int]:
    """The tokens that a step computes; 0 in the place of one that is still on its way."""
    decoding = [(item.request.token_ids, item.start) for item in scheduled[:num_decodes]]
    known = [token_ids[start] if start < len(token_ids) else 0 for token_ids, start in decoding]
    for request, start, num_tokens, draft_ids, *_ in scheduled[num_decodes:]:
        known += request.token_ids[start : start + num_tokens]
        known += draft_ids
    return known


def _inspection(plan: AttentionPlan, sample_rows: NDArray[np.int64], sampling: Sequence[Request]) -> Inspection | None:
    asked = {index: request.attention for index, request in enumerate(sampling) if request.attention is not None}
    return Inspection(plan, sample_rows, asked) if asked else None


def _sample_rows(samples: Sequence[int], plan: AttentionPlan) -> NDArray[np.int64]:
    """Of each request that samples the last rows, one a sample."""
    ends = np.cumsum(samples)
    # Row i of a request's samples lies so far before the end of its rows.
    before_end = np.repeat(ends, samples) - np.arange(ends[-1])
    rows: NDArray[np.int64] = np.repeat(plan.query_start_loc[1:], samples) - before_end
    return rows


def _unread(
    scheduled: Sequence[ScheduledRequest], plan: AttentionPlan, unread: Unread | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows whose tokens are still on their way, and where each of them is in what the last step draws."""
    if unread is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    pending = [index for index, item in enumerate(scheduled) if item.is_unread]
    places = [unread.places[scheduled[index].request] for index in pending]
    return plan.query_start_loc[pending], np.array(places, dtype=np.int64)
