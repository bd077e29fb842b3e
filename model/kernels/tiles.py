"""What the attention kernels share: one tile of keys against one tile of queries, by the online softmax.

The softmax runs in base 2 (`exp2` is what the hardware has), and keeps for each row the largest score so far, the sum
of weights and the weighted values (Milakov and Gimelshein 2018; Dao et al. 2022).
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
# Less than any score, and finite: a tile may leave a row nothing to see, and -inf - -inf is not a number.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def is_seen(row, key, length, window, num_sinks, HAS_WINDOW: tl.constexpr):
    """Whether `row`, a position, sees `key`, a position: nothing of its future, and what the window and sinks leave."""
    seen = (key <= row) & (key < length)
    if HAS_WINDOW:
        seen = seen & ((key > row - window) | (key < num_sinks))
    return seen


@triton.jit
def load_tile(
    k_ptr, v_ptr, table_ptr, key, length, slot_stride, head_offset, dim, dtype: tl.constexpr,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values at positions `key` of a sequence, each [keys, dim], in `dtype`. Zeros past its length: 0 * NaN is
    NaN.
    """
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < length, other=0).to(tl.int64)
    slot = (block * BLOCK_SIZE + key % BLOCK_SIZE) * slot_stride + head_offset
    place, there = slot[:, None] + dim[None, :], (key < length)[:, None] & (dim < DIM)[None, :]
    k, v = tl.load(k_ptr + place, mask=there, other=0.0), tl.load(v_ptr + place, mask=there, other=0.0)
    return k.to(dtype), v.to(dtype)


@triton.jit
def attend_tile(q, k, v, seen, largest, total, weighted, scale, soft_cap, HAS_CAP: tl.constexpr):
    """Take one tile of keys and values into the running softmax of each row.

    q: [rows, dim]; k: [dim, keys]; v: [keys, dim]; seen: [rows, keys]; largest, total: [rows]; weighted: [rows, dim].
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_CAP:
        scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)  # cap * tanh(score / cap)
    scores = tl.where(seen, scores * LOG2E, LOWEST)
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that has seen nothing yet weighs LOWEST by LOWEST, which is 1: the first real score shrinks that to 0.
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, axis=1)
    weighted = weighted * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_largest, total, weighted


def padded(size: int, least: int = 16) -> int:
    """The power of two that a tile's side takes: products need at least 16."""
    return max(least, int(triton.next_power_of_2(size)))
