"""Prefill attention over the paged cache in Triton: sequences of any lengths in one launch, each behind its past.

New tokens times the query heads of a group stand as the rows of a tile. Tiles are laid out on the host, once per step
(`prefill_tiles`), each within one sequence. Rows see everything before them that their window leaves, cached or new.
"""

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.kernels.tiles import LOG2E, LOWEST, attend_tile, is_seen, load_tile, padded

ROWS = 64
TILE = 64


def prefill_tiles(plan: AttentionPlan, group: int) -> NDArray[np.int32]:
    """[num_tiles, 2]: for each tile its sequence, and the first of that sequence's new tokens that it holds.

    Only sequences behind the decodes have tiles.
    """
    tokens = max(1, ROWS // group)
    counts = np.diff(plan.query_start_loc)[plan.num_decodes :]
    tiles = -(-counts // tokens)  # of each sequence
    before = np.repeat(tiles.cumsum() - tiles, tiles)
    seqs = np.repeat(np.arange(plan.num_decodes, plan.num_seqs), tiles)
    return np.stack([seqs, (np.arange(tiles.sum()) - before) * tokens], axis=1).astype(np.int32)


@triton.jit(do_not_specialize=["table_stride"])
def _attend_tile_of_rows(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, starts_ptr, lens_ptr, tables_ptr, sinks_ptr,
    q_token_stride, q_head_stride, slot_stride, head_stride, table_stride,
    scale, soft_cap, window, num_sinks,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one sequence under one key/value head, over all keys that any of its rows sees."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    seq, first = tl.load(tiles_ptr + tile * 2).to(tl.int64), tl.load(tiles_ptr + tile * 2 + 1)
    start, stop, length = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1), tl.load(lens_ptr + seq)
    row, dim, offset = tl.arange(0, ROWS), tl.arange(0, WIDE_DIM), tl.arange(0, TILE)
    token = start + first + row // GROUP  # of the step's tokens
    head = kv_head * GROUP + row % GROUP
    position = length - stop + token
    is_row, is_dim = (row < ROWS // GROUP * GROUP) & (token < stop), dim < DIM
    q = tl.load(
        q_ptr + token[:, None].to(tl.int64) * q_token_stride + head[:, None] * q_head_stride + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    if HAS_SINKS:
        largest = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        largest = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDE_DIM], tl.float32)
    newest = tl.minimum(length, length - stop + start + first + ROWS // GROUP)
    oldest, num_sink_tiles = 0, 0
    if HAS_WINDOW:  # whole tiles: those of the sinks, then those from the window of the first row on
        oldest = tl.maximum(0, length - stop + start + first - window + 1) // TILE * TILE
        num_sink_tiles = tl.cdiv(tl.minimum(num_sinks, oldest), TILE)
    for i in range(num_sink_tiles + tl.cdiv(newest - oldest, TILE)):
        key = tl.where(i < num_sink_tiles, i * TILE, oldest + (i - num_sink_tiles) * TILE) + offset
        k, v = load_tile(
            k_ptr, v_ptr, tables_ptr + seq * table_stride, key, length, slot_stride, kv_head * head_stride, dim,
            q.dtype, DIM, BLOCK_SIZE,
        )  # fmt: skip
        seen = is_seen(position[:, None], key[None, :], length, window, num_sinks, HAS_WINDOW) & is_row[:, None]
        largest, total, weighted = attend_tile(
            q, tl.trans(k), v, seen, largest, total, weighted, scale, soft_cap, HAS_CAP
        )
    out = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (token.to(tl.int64) * num_heads + head) * DIM
    tl.store(
        out_ptr + place[:, None] + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


def prefill_attention(
    scores: Scores, q: Tensor, keys: Tensor, values: Tensor, out: Tensor,
    tiles: Tensor, starts: Tensor, lens: Tensor, tables: Tensor, *, block_size: int,
) -> None:  # fmt: skip
    """Causal attention of several new tokens a sequence, written to their rows of `out`; other rows stay as they are.

    q: [num_tokens, num_heads, head_dim], of any strides but in its last dimension; keys, values: [num_slots,
    num_kv_heads, head_dim]; out: q's shape, contiguous; tiles: see `prefill_tiles`; starts: [num_seqs + 1], where each
    sequence's new tokens begin; lens: [num_seqs]; tables: [num_seqs, max_blocks].
    """
    num_kv_heads, dim = keys.shape[1], q.shape[2]
    group = q.shape[1] // num_kv_heads
    _attend_tile_of_rows[(len(tiles), num_kv_heads)](
        q, keys, values, out, tiles, starts, lens, tables, out if scores.sinks is None else scores.sinks,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), tables.stride(0),
        scores.scale, scores.soft_cap or 0.0, scores.window or 0, scores.num_sink_tokens,
        GROUP=group, ROWS=padded(max(ROWS, group)), DIM=dim, WIDE_DIM=padded(dim), BLOCK_SIZE=block_size, TILE=TILE,
        HAS_WINDOW=scores.window is not None, HAS_CAP=scores.soft_cap is not None,
        HAS_SINKS=scores.sinks is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
