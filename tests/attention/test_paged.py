"""Paged attention against the plain equation: every backend, every option, wherever the blocks lie."""

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
from tests.attention.oracle import config, naive, projected, randomize

pytestmark = pytest.mark.fast

BLOCK_SIZE = 4
NUM_BLOCKS = 120
LAYER = 1
BACKENDS = [ReferenceAttention, GatheredAttention, DeterministicAttention]

OPTIONS = {
    "scaled dot product": {},
    "multiplicative": {"attention": "multiplicative"},
    "additive": {"attention": "additive"},
    "a head each": {"num_kv_heads": 4},
    "one key/value head": {"num_kv_heads": 1},
    "custom scale": {"attention_scale": 0.7},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "window and sink tokens": {"sliding_window": 3, "num_sink_tokens": 2},
    "learned sinks": {"sink_logits": True},
    "soft cap": {"attention_soft_cap": 0.8},
    "multiplicative, window, sink tokens, learned sinks": {
        "attention": "multiplicative", "sliding_window": 4, "num_sink_tokens": 1, "sink_logits": True,
    },
    "additive, scaled, capped, window, sink tokens, learned sinks": {
        "attention": "additive", "attention_scale": 2.0, "attention_soft_cap": 1.5, "sliding_window": 4,
        "num_sink_tokens": 2, "sink_logits": True, "num_kv_heads": 1,
    },
}  # fmt: skip

windows = st.one_of(
    st.just({}),
    st.builds(lambda w, s: {"sliding_window": w, "num_sink_tokens": s}, st.integers(1, 12), st.integers(0, 4)),
)
mixtures = st.builds(
    lambda window, rest: window | rest,
    windows,
    st.fixed_dictionaries(
        {
            "attention": st.sampled_from(["scaled_dot_product", "multiplicative", "additive"]),
            "num_kv_heads": st.sampled_from([1, 2, 4]),
            "attention_scale": st.sampled_from([None, 0.5]),
            "attention_soft_cap": st.sampled_from([None, 1.5]),
            "sink_logits": st.booleans(),
        }
    ),
)
# (tokens in the cache, new tokens) of each sequence.
lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=6)


class Scene:
    """Sequences with a past, stored in a pool whose every other slot is NaN.

    tables, keys, values, queries: one for each sequence; queries and keys as they are before any projection.
    """

    def __init__(self, lengths: list[tuple[int, int]], seed: int = 0, **options: object) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.config = config(**options)
        self.scores = Scores(self.config, LAYER).requires_grad_(False)
        randomize(self.scores, self.generator)
        self.lengths = sorted(lengths, key=lambda length: length[1] > 1)  # decodes first, as a batch is staged
        self.pool = KVPool(self.config, NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"))
        self.pool.keys[:, BLOCK_SIZE:] = torch.nan
        self.pool.values[:, BLOCK_SIZE:] = torch.nan
        self.free = (torch.randperm(NUM_BLOCKS, generator=self.generator) + 1).tolist()
        self.tables: list[list[int]] = []
        self.queries, self.keys, self.values = [], [], []
        for past, new in self.lengths:
            self.tables.append([self.free.pop() for _ in range(math.ceil((past + new) / BLOCK_SIZE))])
            self.keys.append(self.random(past + new, self.config.num_kv_heads))
            self.values.append(self.random(past + new, self.config.num_kv_heads))
            self.queries.append(self.random(new, self.config.num_heads))
            self.store(len(self.tables) - 1, past)

    def random(self, num_tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, heads, self.config.head_dim, generator=self.generator)

    def store(self, sequence: int, past: int) -> None:
        """Put the first `past` keys and values of a sequence into the cache."""
        table, k = self.tables[sequence], self.keys[sequence][:past]
        slots = torch.tensor([table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(past)]).long()
        _, k = self.scores.project(k.new_zeros(past, self.config.num_heads, self.config.head_dim), k)
        self.pool.store(LAYER, slots, k, self.values[sequence][:past])

    def attend(self, backend: type) -> torch.Tensor:
        starts, counts = zip(*self.lengths, strict=True)
        attend = backend(AttentionPlan.build(BLOCK_SIZE, starts, counts, self.tables), self.pool)
        new = [(k[past:], v[past:]) for (past, _), k, v in zip(self.lengths, self.keys, self.values, strict=True)]
        new_keys, new_values = (torch.cat(parts) for parts in zip(*new, strict=True))
        return attend(self.scores, *self.scores.project(torch.cat(self.queries), new_keys), new_values)

    def expected(self) -> torch.Tensor:
        found = []
        for q, k, v in zip(self.queries, self.keys, self.values, strict=True):
            found.append(naive(self.config, self.scores, *projected(self.scores, q, k), v)[0])
        return torch.cat(found).float()


def assert_equal_to_the_equation(backend: type, scene: Scene) -> None:
    torch.testing.assert_close(scene.attend(backend), scene.expected(), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@settings(max_examples=8, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 2**16))
def test_every_option_equals_its_equation(backend, options, lengths, seed):
    assert_equal_to_the_equation(backend, Scene(lengths, seed, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(lengths=lengths, options=mixtures, seed=st.integers(0, 2**16))
def test_every_mixture_of_options_equals_its_equation(backend, lengths, options, seed):
    assert_equal_to_the_equation(backend, Scene(lengths, seed, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_long_sequences_equal_the_equation(backend, options):
    """Longer than a split and a tile of the deterministic backend, and with windows that end in an earlier split."""
    scene = Scene([(130, 1), (63, 1), (64, 1), (50, 20), (0, 40)], **options)
    assert_equal_to_the_equation(backend, scene)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), options=mixtures, seed=st.integers(0, 2**16))
def test_a_sequence_in_chunks_equals_the_whole(backend, data, options, seed):
    length = data.draw(st.integers(2, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    scene = Scene([(0, length)], seed, **options)
    whole = scene.attend(backend)
    scene.pool.keys[:, BLOCK_SIZE:] = scene.pool.values[:, BLOCK_SIZE:] = torch.nan
    q, k, v = scene.queries[0], scene.keys[0], scene.values[0]
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        scene.lengths, scene.queries = [(start, stop - start)], [q[start:stop]]
        scene.keys, scene.values = [k[:stop]], [v[:stop]]
        chunks.append(scene.attend(backend))
    torch.testing.assert_close(torch.cat(chunks), whole, atol=4e-6, rtol=1e-5)
    if backend is DeterministicAttention:
        assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_deterministic_rows_do_not_depend_on_their_company(options):
    company = [(130, 1), (3, 1), (70, 20), (0, 5), (17, 33)]
    together = Scene(company, **options)
    rows = together.attend(DeterministicAttention)
    lone = Scene(company, **options)
    for i in range(len(company)):
        only = slice(i, i + 1)
        for name in ("lengths", "tables", "queries", "keys", "values"):
            setattr(lone, name, getattr(together, name)[only])
        first = sum(new for _, new in together.lengths[:i])
        assert torch.equal(lone.attend(DeterministicAttention), rows[first : first + together.lengths[i][1]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sequences_that_share_their_first_blocks_see_the_same_past(backend, options):
    scene = Scene([(17, 1), (13, 6), (12, 1)], **options)
    shared = 12  # three blocks
    for i in (1, 2):
        scene.tables[i][: shared // BLOCK_SIZE] = scene.tables[0][: shared // BLOCK_SIZE]
        scene.keys[i][:shared], scene.values[i][:shared] = scene.keys[0][:shared], scene.values[0][:shared]
    assert_equal_to_the_equation(backend, scene)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_token_never_sees_its_future(backend, options):
    scene = Scene([(3, 5)], **options)
    before = scene.attend(backend)
    scene.keys[0][-1], scene.values[0][-1] = 100.0, 100.0
    after = scene.attend(backend)
    assert torch.equal(after[:-1], before[:-1])
    assert not torch.allclose(after[-1], before[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_sees_nothing_of_what_lies_between_its_sink_tokens_and_its_window(backend):
    scene = Scene([(11, 1)], sliding_window=4, num_sink_tokens=2)
    before = scene.attend(backend)
    scene.keys[0][2:8], scene.values[0][2:8] = 100.0, 100.0
    scene.store(0, 11)
    assert torch.equal(scene.attend(backend), before)
    for visible in (1, 8):
        scene.values[0][visible] = 100.0
        scene.store(0, 11)
        assert not torch.allclose(scene.attend(backend), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bf16_stays_bf16_and_close(backend, options):
    scene = Scene([(9, 1), (2, 1), (5, 6), (0, 7)], **options)
    expected = scene.expected()
    scene.pool.keys, scene.pool.values = scene.pool.keys.bfloat16(), scene.pool.values.bfloat16()
    scene.scores.bfloat16()
    for name in ("queries", "keys", "values"):
        setattr(scene, name, [x.bfloat16() for x in getattr(scene, name)])
    found = scene.attend(backend)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.06, rtol=0.05)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_null_block_stays_zero(options):
    scene = Scene([(5, 1), (2, 1), (0, 6)], **options)
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


def test_a_window_gathers_what_it_leaves_and_the_sink_tokens_before_it():
    plan = AttentionPlan.build(4, starts=[9, 1], counts=[1, 1], tables=[[5, 6, 7], [8]])
    positions = plan.key_positions(0, 2, 1, window=3, num_sinks=2)
    assert positions.tolist() == [[0, 1, 7, 8, 9], [-1, -1, -1, 0, 1]]
    assert plan.slots(0, positions).tolist() == [[20, 21, 27, 28, 29], [0, 0, 0, 32, 33]]
