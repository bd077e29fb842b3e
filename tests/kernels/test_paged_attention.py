"""The Triton attention kernels against the oracle: any lengths, blocks anywhere, NaN in every foreign slot."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import triton_decode
from model.attention.paged import PagedAttention
from model.attention.plan import AttentionPlan
from model.attention.reference import ReferenceAttention
from model.attention.scores import Attend, Scores
from model.cache.pool import FP8, KVPool
from model.config import ModelConfig

pytestmark = pytest.mark.fast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BLOCK_SIZE, NUM_BLOCKS = 16, 60
PLAIN = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=24,
    max_position_embeddings=1024,
)  # fmt: skip
OPTIONS = {
    "plain": PLAIN,
    "one kv head": replace(PLAIN, num_kv_heads=1, head_dim=16),
    "a head each": replace(PLAIN, num_kv_heads=6, head_dim=10),
    "scale": replace(PLAIN, attention_scale=0.7),
    "window": replace(PLAIN, sliding_window=20),
    "window of one token": replace(PLAIN, sliding_window=1),
    "window and sink tokens": replace(PLAIN, sliding_window=20, num_sink_tokens=3),
    "more sink tokens than a tile": replace(PLAIN, sliding_window=30, num_sink_tokens=100),
    "soft cap": replace(PLAIN, attention_soft_cap=3.0),
    "learned sinks": replace(PLAIN, sink_logits=True),
    "all of them": replace(PLAIN, sliding_window=70, num_sink_tokens=5, attention_soft_cap=5.0, sink_logits=True),
}
# (tokens cached before, new tokens) of each sequence, decodes first.
DECODES = [(5, 1), (300, 1), (255, 1), (0, 1)]
PREFILLS = [(0, 30), (44, 21), (200, 50)]
MIXED = [(77, 1), (256, 1), (0, 3), (90, 65)]


def attend(backend: type[Attend], config: ModelConfig, lengths: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(lengths))

    def normal(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, config.head_dim, generator=generator).to(DEVICE, dtype)

    scores = Scores(config, 0).to(DEVICE)
    if scores.sinks is not None:
        scores.sinks.data.copy_(torch.randn(config.num_heads, generator=generator))
    pool = KVPool(config, NUM_BLOCKS, BLOCK_SIZE, dtype, DEVICE)
    pool.keys[:, BLOCK_SIZE:], pool.values[:, BLOCK_SIZE:] = torch.nan, torch.nan
    free = (torch.randperm(NUM_BLOCKS, generator=generator) + 1).tolist()
    tables = []
    for past, new in lengths:
        table = [free.pop() for _ in range(-(-(past + new) // BLOCK_SIZE))]
        slots = torch.tensor([table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(past)]).long()
        pool.store(0, slots.to(DEVICE), normal(past, config.num_kv_heads), normal(past, config.num_kv_heads))
        tables.append(table)
    num_new = sum(new for _, new in lengths)
    # As in the decoder: queries, keys and values are slices of one projection, so their rows are not contiguous.
    qkv = normal(num_new, config.num_heads + 2 * config.num_kv_heads)
    q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
    plan = AttentionPlan.build(BLOCK_SIZE, [past for past, _ in lengths], [new for _, new in lengths], tables)
    with torch.no_grad():
        return backend(plan, pool)(scores, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [DECODES, PREFILLS, MIXED], ids=["decodes", "prefills", "mixed"])
@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_kernels_equal_the_oracle(config, lengths, dtype):
    found, expected = (attend(backend, config, lengths, dtype) for backend in (PagedAttention, ReferenceAttention))
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_additive_scores_go_where_they_can_be_computed():
    config = replace(PLAIN, attention="additive")
    generator = torch.Generator().manual_seed(0)
    scores = Scores(config, 0)
    scores.init_weights(generator)
    scores.to(DEVICE)
    plan = AttentionPlan.build(BLOCK_SIZE, [0], [9], [[3]])
    q, k, v = (torch.randn(9, heads, 24, generator=generator).to(DEVICE) for heads in (6, 2, 2))
    with torch.no_grad():
        found, expected = (
            backend(plan, KVPool(config, 4, BLOCK_SIZE, torch.float32, DEVICE))(scores, q, k, v)
            for backend in (PagedAttention, ReferenceAttention)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_decode_does_not_depend_on_its_company():
    generator = torch.Generator().manual_seed(3)
    scores, pool = Scores(PLAIN, 0), KVPool(PLAIN, NUM_BLOCKS, BLOCK_SIZE, torch.float32, DEVICE)
    pool.keys.copy_(torch.randn(pool.keys.shape, generator=generator))
    pool.values.copy_(torch.randn(pool.values.shape, generator=generator))
    q, k, v = (torch.randn(2, heads, 24, generator=generator).to(DEVICE) for heads in (6, 2, 2))
    short, long = [1, 2], list(range(3, 40))
    together = AttentionPlan.build(BLOCK_SIZE, [20, 580], [1, 1], [short, long])
    alone = AttentionPlan.build(BLOCK_SIZE, [20], [1], [short])
    with torch.no_grad():
        both = PagedAttention(together, pool)(scores, q, k, v)
        one = PagedAttention(alone, pool)(scores, q[:1], k[:1], v[:1])
    assert torch.equal(both[:1], one)


def test_few_programs_take_turns_at_the_splits(monkeypatch):
    before = attend(PagedAttention, PLAIN, DECODES, torch.float32)
    monkeypatch.setattr(triton_decode, "PROGRAMS", 1)
    assert torch.equal(attend(PagedAttention, PLAIN, DECODES, torch.float32), before)


def test_more_splits_than_are_merged_at_a_time_are_merged_like_few(monkeypatch):
    monkeypatch.setattr(triton_decode, "SPLIT", 16)
    monkeypatch.setattr(triton_decode, "TILE", 16)
    sinks = replace(PLAIN, sink_logits=True)
    found, expected = (
        attend(backend, sinks, DECODES, torch.float32) for backend in (PagedAttention, ReferenceAttention)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_keys_and_values_in_fp8_are_attended_to_as_they_were_rounded(lengths):
    generator = torch.Generator().manual_seed(7)
    blocks = [-(-(past + new) // BLOCK_SIZE) for past, new in lengths]
    tables = [list(range(1 + sum(blocks[:i]), 1 + sum(blocks[: i + 1]))) for i in range(len(blocks))]
    plan = AttentionPlan.build(BLOCK_SIZE, [past for past, _ in lengths], [new for _, new in lengths], tables)
    narrow, wide = (KVPool(PLAIN, sum(blocks), BLOCK_SIZE, dtype, DEVICE) for dtype in (FP8, torch.float32))
    slots = torch.arange(BLOCK_SIZE, (sum(blocks) + 1) * BLOCK_SIZE, device=DEVICE)
    past = [torch.randn(len(slots), 2, 24, generator=generator).to(DEVICE) for _ in range(2)]
    q, *new = (
        torch.randn(int(plan.query_start_loc[-1]), heads, 24, generator=generator).to(DEVICE) for heads in (6, 2, 2)
    )
    narrow.store(0, slots, *past)
    wide.store(0, slots, *(x.to(FP8).float() for x in past))
    scores = Scores(PLAIN, 0)
    with torch.no_grad():
        found = PagedAttention(plan, narrow)(scores, q, *new)
        expected = ReferenceAttention(plan, wide)(scores, q, *(x.to(FP8).float() for x in new))
        exact = ReferenceAttention(plan, wide)(scores, q, *new)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - exact).abs().max() > 1e-3  # the rounding of the new tokens shows
