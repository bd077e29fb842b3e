"""Paged attention against the plain equation, wherever the blocks lie and whatever else they hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.deterministic import DeterministicAttention
from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.attention.reference import ReferenceAttention
from model.attention.scores import Scores
from model.cache.pool import KVPool
from model.config import ModelConfig

pytestmark = pytest.mark.fast

BLOCK_SIZE = 4
NUM_BLOCKS = 40
LAYER = 1


def config(num_heads: int = 4, num_kv_heads: int = 2) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence, no cache, one number at a time. q: [num_new, heads, dim]; k, v: [seq_len, kv_heads, dim]."""
    num_new, num_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = k.shape
    out = torch.zeros_like(q)
    for row in range(num_new):
        visible = seq_len - num_new + row + 1
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = [float(q[row, head] @ k[t, kv_head]) / math.sqrt(head_dim) for t in range(visible)]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            for t, weight in enumerate(weights):
                out[row, head] += weight / sum(weights) * v[t, kv_head]
    return out


class Scene:
    """Sequences with a past, stored in a pool whose every other slot is NaN."""

    def __init__(self, lengths: list[tuple[int, int]], seed: int, num_heads: int = 4, num_kv_heads: int = 2):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = sorted(lengths, key=lambda length: length[1] > 1)  # decodes first, as a batch is staged
        self.pool = KVPool(config(num_heads, num_kv_heads), NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"))
        self.pool.keys[:, BLOCK_SIZE:] = torch.nan
        self.pool.values[:, BLOCK_SIZE:] = torch.nan
        free = (torch.randperm(NUM_BLOCKS, generator=generator) + 1).tolist()
        self.tables, self.keys, self.values, queries = [], [], [], []
        for past, new in self.lengths:
            table = [free.pop() for _ in range(math.ceil((past + new) / BLOCK_SIZE))]
            k, v = torch.randn(2, past + new, num_kv_heads, 8, generator=generator)
            slots = torch.tensor([table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(past)]).long()
            self.pool.store(LAYER, slots, k[:past], v[:past])
            self.tables.append(table)
            self.keys.append(k)
            self.values.append(v)
            queries.append(torch.randn(new, num_heads, 8, generator=generator))
        self.queries = queries
        self.scores = Scores(config(num_heads, num_kv_heads), LAYER)

    def attend(self, backend: type) -> torch.Tensor:
        starts, counts = zip(*self.lengths, strict=True)
        attend = backend(AttentionPlan.build(BLOCK_SIZE, starts, counts, self.tables), self.pool)
        new = [(k[past:], v[past:]) for (past, _), k, v in zip(self.lengths, self.keys, self.values, strict=True)]
        new_keys, new_values = (torch.cat(parts) for parts in zip(*new, strict=True))
        return attend(self.scores, torch.cat(self.queries), new_keys, new_values)

    def expected(self) -> torch.Tensor:
        return torch.cat([naive(q, k, v) for q, k, v in zip(self.queries, self.keys, self.values, strict=True)])


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=6)


@pytest.mark.parametrize("backend", [ReferenceAttention, GatheredAttention, DeterministicAttention])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@settings(max_examples=25, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 2**16))
def test_paged_attention_equals_the_equation(backend, num_heads, num_kv_heads, lengths, seed):
    scene = Scene(lengths, seed, num_heads, num_kv_heads)
    torch.testing.assert_close(scene.attend(backend), scene.expected(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", [ReferenceAttention, GatheredAttention])
def test_a_token_never_sees_its_future(backend):
    scene = Scene([(3, 5)], seed=0)
    before = scene.attend(backend)
    scene.keys[0][-1], scene.values[0][-1] = 100.0, 100.0
    after = scene.attend(backend)
    torch.testing.assert_close(after[:-1], before[:-1])
    assert not torch.allclose(after[-1], before[-1])


def test_the_null_block_stays_zero():
    scene = Scene([(5, 1), (2, 1), (0, 6)], seed=1)
    scene.attend(GatheredAttention)
    assert not scene.pool.keys[:, :BLOCK_SIZE].any()
    assert not scene.pool.values[:, :BLOCK_SIZE].any()


def test_a_plan_maps_new_tokens_to_the_slots_behind_the_past():
    plan = AttentionPlan.build(4, starts=[5, 0], counts=[1, 6], tables=[[7, 3], [2, 9]])
    assert plan.slot_mapping.tolist() == [3 * 4 + 1, 8, 9, 10, 11, 36, 37]
    assert plan.seq_lens.tolist() == [6, 6]
    assert plan.query_start_loc.tolist() == [0, 1, 7]
    assert plan.num_decodes == 1


def test_a_plan_pads_short_sequences_with_the_null_block():
    plan = AttentionPlan.build(4, starts=[1, 4], counts=[1, 1], tables=[[5], [6, 7]])
    assert plan.all_slots(0, 2).tolist() == [[20, 21, 0, 0, 0], [24, 25, 26, 27, 28]]
