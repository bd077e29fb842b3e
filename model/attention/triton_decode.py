"""Decode attention over the paged cache in Triton: split over the context, so that few sequences fill the card too.

Each program takes one sequence, one key/value head and some splits of `SPLIT` tokens; the query heads of the group
stand as rows of one tile, so a key is read once for all of them. A second kernel merges the splits. A split has one
size whatever else is in the batch, so a sequence's result does not depend on its company.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.scores import Scores
from model.kernels.tiles import LOG2E, LOWEST, attend_tile, is_seen, load_tile, padded

SPLIT = 256
TILE = 64
MERGED = 16  # splits at a time
# So many programs fill a large card a few times over; more would only take turns at shorter pieces.
PROGRAMS = 1024


# Compiled once, whatever the step: Triton would compile anew for a number that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _attend_splits(
    q_ptr, k_ptr, v_ptr, partial_ptr, log_ptr, tables_ptr, lens_ptr,
    q_token_stride, q_head_stride, slot_stride, head_stride, table_stride, num_splits,
    scale, soft_cap, window, num_sinks,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Splits of one sequence under one key/value head: of each its weighted values, and the log of its weights' sum.

    Programs of one sequence take turns, so that the grid need not know how long sequences are (a CUDA graph cannot).
    """
    seq, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    length = tl.load(lens_ptr + seq)
    row, dim, offset = tl.arange(0, ROWS), tl.arange(0, WIDE_DIM), tl.arange(0, TILE)
    head = kv_head * GROUP + row
    is_row, is_dim = row < GROUP, dim < DIM
    q = tl.load(
        q_ptr + seq * q_token_stride + head[:, None] * q_head_stride + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    for split in range(tl.program_id(2), tl.cdiv(length, SPLIT), tl.num_programs(2)):
        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, WIDE_DIM], tl.float32)
        first = split * SPLIT
        last = tl.minimum(first + SPLIT, length)
        if HAS_WINDOW:
            if first >= num_sinks:  # no sink in this split: it begins where the window does
                first = tl.maximum(first, (length - window) // TILE * TILE)
        for start in range(first, last, TILE):
            key = start + offset
            k, v = load_tile(
                k_ptr, v_ptr, tables_ptr + seq * table_stride, key, length, slot_stride, kv_head * head_stride, dim,
                q.dtype, DIM, BLOCK_SIZE,
            )  # fmt: skip
            seen = is_seen(length - 1, key, length, window, num_sinks, HAS_WINDOW)[None, :] & is_row[:, None]
            largest, total, weighted = attend_tile(
                q, tl.trans(k), v, seen, largest, total, weighted, scale, soft_cap, HAS_CAP
            )
        place = (seq * num_kv_heads * GROUP + head) * num_splits + split
        # Nothing seen: the split counts for nothing, and its values are zeros.
        counted = tl.where(total == 0.0, 1.0, total)
        log = tl.where(total == 0.0, LOWEST, largest + tl.log2(counted))
        weighted = weighted / counted[:, None]
        tl.store(partial_ptr + place[:, None] * DIM + dim[None, :], weighted, mask=is_row[:, None] & is_dim[None, :])
        tl.store(log_ptr + place, log, mask=is_row)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(
    partial_ptr, log_ptr, lens_ptr, sinks_ptr, out_ptr, num_splits,
    DIM: tl.constexpr, WIDE_DIM: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The splits of one sequence under one query head, weighed by their sums; a learned sink adds only weight.

    Some are taken at a time, whose loads do not wait for one another: as many whatever else is in the batch.
    """
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    dim = tl.arange(0, WIDE_DIM)
    place = (seq * num_heads + head) * num_splits
    largest, total = tl.full([1], LOWEST, tl.float32), tl.zeros([1], tl.float32)
    if HAS_SINKS:
        largest, total = largest * 0.0 + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E, total + 1.0
    weighted = tl.zeros([WIDE_DIM], tl.float32)
    count = tl.cdiv(tl.load(lens_ptr + seq), SPLIT)
    for first in range(0, count, MERGED):
        split = first + tl.arange(0, MERGED)
        there = split < count
        log = tl.load(log_ptr + place + split, mask=there, other=LOWEST)
        value = tl.load(
            partial_ptr + (place + split)[:, None] * DIM + dim[None, :],
            mask=there[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(log, axis=0))
        shrink, weight = tl.exp2(largest - new_largest), tl.where(there, tl.exp2(log - new_largest), 0.0)
        total = total * shrink + tl.sum(weight, axis=0)
        weighted = weighted * shrink + tl.sum(value * weight[:, None], axis=0)
        largest = new_largest
    out = weighted / tl.where(total == 0.0, 1.0, total)  # a row that only pads the batch has seen nothing
    tl.store(out_ptr + (seq * num_heads + head) * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def decode_attention(
    scores: Scores,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tables: Tensor,
    lens: Tensor,
    *,
    block_size: int,
    longest: int,
) -> None:
    """Causal attention of one new token for each sequence over its cached keys and values, its own included, to `out`.

    q: [num_seqs, num_heads, head_dim], of any strides but in its last dimension; keys, values: [num_slots,
    num_kv_heads, head_dim]; out: q's shape, contiguous; tables: [num_seqs, max_blocks]; lens: [num_seqs], at most
    `longest`, and 0 for rows that only pad the batch, which come out as zeros. What lies in a cache past a sequence's
    length is never read into the result, whatever it is.
    """
    num_seqs, num_heads, dim = q.shape
    num_kv_heads = keys.shape[1]
    num_splits = triton.cdiv(longest, SPLIT)
    num_programs = min(num_splits, max(1, PROGRAMS // (num_seqs * num_kv_heads)))
    partial = torch.empty((num_seqs, num_heads, num_splits, dim), dtype=torch.float32, device=q.device)
    logs = torch.empty((num_seqs, num_heads, num_splits), dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    _attend_splits[(num_seqs, num_kv_heads, num_programs)](
        q, keys, values, partial, logs, tables, lens,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), tables.stride(0), num_splits,
        scores.scale, scores.soft_cap or 0.0, scores.window or 0, scores.num_sink_tokens,
        GROUP=group, ROWS=padded(group), DIM=dim, WIDE_DIM=padded(dim),
        BLOCK_SIZE=block_size, SPLIT=SPLIT, TILE=TILE,
        HAS_WINDOW=scores.window is not None, HAS_CAP=scores.soft_cap is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge_splits[(num_seqs, num_heads)](
        partial, logs, lens, out if scores.sinks is None else scores.sinks, out, num_splits,
        DIM=dim, WIDE_DIM=padded(dim), SPLIT=SPLIT, MERGED=MERGED, HAS_SINKS=scores.sinks is not None,
    )  # fmt: skip
