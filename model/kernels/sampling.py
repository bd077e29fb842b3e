"""One token a row, on the device: greedy, or drawn after min-p, top-k and top-p, without a sort and without a sync.

What is drawn is what `model.sampling.draw` defines: the first token, in the order of ids, at which the cumulative
distribution passes the number keyed by (seed, position). The two may differ only where that number, or the border of a
nucleus, falls within the rounding of a sum.

A bar below which tokens are out is found by halving the range of logits, as ordered integers, until one is left: each
pass only counts, or adds up, what lies above. A row that asks for nothing but a temperature takes no pass at all: what
each block weighs is known from the search for the largest logit, so one block is looked into.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # of ids: sums are of one block in fp32, then over blocks in fp64
BLOCKS = 16  # at a time
FAR = tl.constexpr(104.0)  # so far below the largest logit a weight is zero in fp32


@triton.jit
def _mixed(x):
    """SplitMix64 (Steele et al. 2014)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _ordered(x):
    """An int32 for each float, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_blocks(logits_ptr, first, vocab_size, temperature, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The ids of some blocks from `first` on and their logits over the temperature, [BLOCKS, BLOCK] each."""
    token = first + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return token, logits / temperature


@triton.jit
def _above(
    logits_ptr, vocab_size, temperature, largest, bar, COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """How many tokens lie above `bar`, an ordered logit, or what they weigh."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, vocab_size, BLOCK * BLOCKS):
        _, logits = _load_blocks(logits_ptr, first, vocab_size, temperature, BLOCK, BLOCKS)
        weights = tl.where(logits == logits, 1.0, 0.0) if COUNT else tl.exp(logits - largest)
        total += tl.sum(tl.sum(tl.where(_ordered(logits) > bar, weights, 0.0), axis=1).to(tl.float64))
    return tl.sum(total)


@triton.jit
def _lowest_kept(
    logits_ptr, vocab_size, temperature, largest, low, limit,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The lowest ordered logit, from `low` on, above which there is less than `limit`."""
    high = _ordered(largest).to(tl.int64)
    low = low.to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        above = _above(logits_ptr, vocab_size, temperature, largest, middle, COUNT, BLOCK, BLOCKS)
        enough = above < limit
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _draw(
    logits_ptr, vocab_size, temperature, largest, bar, uniform, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """The first token at which the cumulative weight of what is kept passes `uniform` times its total."""
    total = _above(logits_ptr, vocab_size, temperature, largest, bar - 1, False, BLOCK, BLOCKS)
    target = uniform * total
    before, passed, found = total * 0.0, total * 0.0, total.to(tl.int64) * 0
    for first in range(0, vocab_size, BLOCK * BLOCKS):
        _, logits = _load_blocks(logits_ptr, first, vocab_size, temperature, BLOCK, BLOCKS)
        weights = tl.where(_ordered(logits) >= bar, tl.exp(logits - largest), 0.0)
        cumulative = before + tl.cumsum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
        passes = (cumulative <= target) & (cumulative < total)  # rounding can put the target at the very end
        found += tl.sum(passes.to(tl.int64))
        passed = tl.maximum(passed, tl.max(tl.where(passes, cumulative, 0.0)))
        before = tl.max(cumulative)
    return _draw_in_block(logits_ptr, vocab_size, temperature, largest, bar, found, target - passed, BLOCK)


@triton.jit
def _draw_in_block(logits_ptr, vocab_size, temperature, largest, bar, block, target, BLOCK: tl.constexpr):
    """The first token of a block at which the cumulative weight of what is kept there passes `target`."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32) / temperature
    weights = tl.where(_ordered(logits) >= bar, tl.exp(logits - largest), 0.0).to(tl.float64)
    cumulative = tl.cumsum(weights, axis=0)
    passes = (cumulative <= target) & (cumulative < tl.max(cumulative))
    return block * BLOCK + tl.sum(passes.to(tl.int64))


@triton.jit
def _draw_by_sums(
    logits_ptr, sums_ptr, largest_ptr, vocab_size, num_pieces, temperature, largest, bar, uniform,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The same of a row of which nothing is left out. sums: of each block, by the largest logit of its piece."""
    block = tl.arange(0, PIECES * BLOCKS)
    there = block < num_pieces * BLOCKS
    of_piece = tl.load(largest_ptr + block // BLOCKS, mask=there, other=float("-inf")) / temperature
    sums = tl.load(sums_ptr + block, mask=there, other=0.0)
    cumulative = tl.cumsum(sums.to(tl.float64) * tl.exp(of_piece - largest).to(tl.float64), axis=0)
    total = tl.max(cumulative)
    target = uniform * total
    passes = (cumulative <= target) & (cumulative < total)
    passed = tl.max(tl.where(passes, cumulative, 0.0))
    found = tl.sum(passes.to(tl.int64))
    return _draw_in_block(logits_ptr, vocab_size, temperature, largest, bar, found, target - passed, BLOCK)


@triton.jit
def _largest_of_pieces(
    logits_ptr, largest_ptr, places_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    stride, vocab_size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest logit of one piece of a row, NaN if one of the piece is, and the first id that has it. For a row that
    asks for nothing but a temperature, also what each block weighs by that logit.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, logits = _load_blocks(logits_ptr + row * stride, piece * BLOCK * BLOCKS, vocab_size, 1.0, BLOCK, BLOCKS)
    strange = tl.sum((logits != logits).to(tl.int32))
    largest = tl.max(logits)
    place = row * tl.num_programs(1) + piece
    tl.store(largest_ptr + place, tl.where(strange > 0, float("nan"), largest))
    tl.store(places_ptr + place, tl.min(tl.where(logits == largest, token, vocab_size - 1)))
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & _keeps_all(row, top_k_ptr, top_p_ptr, min_p_ptr):
        is_number = (largest > float("-inf")) & (largest < float("inf"))
        by = tl.where(is_number, largest / temperature, 0.0)
        sums = tl.sum(tl.exp(logits / temperature - by), axis=1)
        tl.store(sums_ptr + place * BLOCKS + tl.arange(0, BLOCKS), sums)


@triton.jit
def _keeps_all(row, top_k_ptr, top_p_ptr, min_p_ptr):
    """Whether a row's request leaves no token out."""
    return (tl.load(top_k_ptr + row) <= 0) & (tl.load(top_p_ptr + row) >= 1) & (tl.load(min_p_ptr + row) <= 0)


@triton.jit
def _sample(
    logits_ptr, largest_ptr, places_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr,
    positions_ptr, ids_ptr, told_ptr, stride, vocab_size, num_pieces,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One row of logits, of which the largest of each piece is known, by what its request asks for."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    piece = tl.arange(0, PIECES)
    there = piece < num_pieces
    of_piece = tl.load(largest_ptr + row * num_pieces + piece, mask=there, other=float("-inf"))
    place = tl.load(places_ptr + row * num_pieces + piece, mask=there, other=vocab_size - 1)
    strange = tl.sum((of_piece != of_piece).to(tl.int32))
    largest = tl.max(of_piece)
    chosen = tl.min(tl.where(of_piece == largest, place, vocab_size - 1)).to(tl.int64)
    usable = (strange == 0) & (largest > float("-inf")) & (largest < float("inf"))
    temperature = tl.load(temperature_ptr + row)
    if usable & (temperature > 0):
        largest = largest / temperature
        bar = _ordered(largest - FAR).to(tl.int64)
        seed, position = tl.load(seed_ptr + row).to(tl.uint64), tl.load(positions_ptr + row).to(tl.uint64)
        # 48 bits, as in `keyed_uniforms`.
        uniform = (_mixed(_mixed(seed) + position) >> 16).to(tl.float64) * 3.552713678800501e-15
        if _keeps_all(row, top_k_ptr, top_p_ptr, min_p_ptr):
            chosen = _draw_by_sums(
                logits_ptr, sums_ptr + row * num_pieces * BLOCKS, largest_ptr + row * num_pieces, vocab_size,
                num_pieces, temperature, largest, bar, uniform, BLOCK, BLOCKS, PIECES,
            )  # fmt: skip
        else:
            min_p, top_k, top_p = tl.load(min_p_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            if min_p > 0:
                bar = tl.maximum(bar, _ordered(largest + tl.log(min_p)).to(tl.int64))
            if top_k > 0:
                bar = _lowest_kept(logits_ptr, vocab_size, temperature, largest, bar, top_k, True, BLOCK, BLOCKS)
            if top_p < 1:
                kept = _above(logits_ptr, vocab_size, temperature, largest, bar - 1, False, BLOCK, BLOCKS)
                limit = top_p * kept
                bar = _lowest_kept(logits_ptr, vocab_size, temperature, largest, bar, limit, False, BLOCK, BLOCKS)
            chosen = _draw(logits_ptr, vocab_size, temperature, largest, bar, uniform, BLOCK, BLOCKS)
    tl.store(ids_ptr + row, chosen)
    tl.store(told_ptr + row, tl.where(usable, chosen, -1))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids, each one of the vocabulary; and what to tell the host: the same, or -1 where the row was not one of
    numbers, or all of it -inf. Both [n] int64, in `out` where that is given.

    logits: [n, vocab_size], -inf where a token is out; the others: [n], what each row's request asks for, and where its
    token will stand; temperature, top_p and min_p in fp32, position in int32, the rest in int64.
    """
    ids, told = out or (torch.empty(len(logits), dtype=torch.int64, device=logits.device) for _ in range(2))
    rows, vocab_size = logits.shape
    # One program a row would take 40 us to look through 151,936 logits, whatever else the card could do meanwhile.
    pieces = triton.cdiv(vocab_size, BLOCK * BLOCKS)
    largest = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    sums = torch.empty(rows, pieces * BLOCKS, dtype=torch.float32, device=logits.device)
    _largest_of_pieces[(rows, pieces)](
        logits, largest, places, sums, temperature, top_k, top_p, min_p, logits.stride(0), vocab_size,
        BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=8,
    )  # fmt: skip
    _sample[(rows,)](
        logits, largest, places, sums, temperature, top_k, top_p, min_p, seed, position, ids, told,
        logits.stride(0), vocab_size, pieces, BLOCK=BLOCK, BLOCKS=BLOCKS, PIECES=triton.next_power_of_2(pieces),
        num_warps=8,
    )  # fmt: skip
    return ids, told
