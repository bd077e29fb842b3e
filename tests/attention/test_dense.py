"""Attention over whole sequences, as training computes it: the same equations, differentiable, in bounded memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import scores as scores_module
from model.attention.dense import DenseCausalAttention
from model.attention.scores import Scores, additive
from model.decoder import Decoder
from tests.attention.oracle import config, naive, projected, randomize
from tests.attention.test_paged import OPTIONS, mixtures

pytestmark = pytest.mark.fast

KINDS = ["scaled_dot_product", "multiplicative", "additive"]


def random_scores(**options: object) -> Scores:
    scores = Scores(config(**options), 0)
    randomize(scores, torch.Generator().manual_seed(0))
    return scores


def assert_equal_to_the_equation(batch: int, length: int, seed: int, options: dict[str, object]) -> None:
    made, scores = config(**options), random_scores(**options)
    torch.manual_seed(seed)
    q = torch.randn(batch * length, made.num_heads, made.head_dim)
    k, v = torch.randn(2, batch * length, made.num_kv_heads, made.head_dim)
    found = DenseCausalAttention(batch, length)(scores, *scores.project(q, k), v)
    for rows in torch.arange(batch * length).split(length):
        expected, _ = naive(made, scores, *projected(scores, q[rows], k[rows]), v[rows])
        torch.testing.assert_close(found[rows], expected.float(), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_its_equation(options):
    assert_equal_to_the_equation(3, 11, 0, options)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 9), options=mixtures, seed=st.integers(0, 2**16))
def test_every_mixture_of_options_equals_its_equation(batch, length, options, seed):
    assert_equal_to_the_equation(batch, length, seed, options)


def loss(decoder: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token."""
    batch, length = token_ids.shape
    attend = DenseCausalAttention(batch, length)
    logits = decoder.logits(decoder(token_ids.flatten(), torch.arange(length).repeat(batch), attend))
    return torch.nn.functional.cross_entropy(
        logits.unflatten(0, (batch, length))[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()
    )


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4, "num_sink_tokens": 1, "attention_soft_cap": 3.0}])
def test_gradients_reach_every_parameter(attention, options):
    decoder = Decoder(config(attention=attention, sink_logits=True, qkv_bias=True, **options))
    decoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    loss(decoder, torch.randint(96, (2, 12))).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", KINDS)
def test_each_kind_learns_by_heart(attention):
    decoder = Decoder(config(attention=attention))
    decoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    token_ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01)
    first = loss(decoder, token_ids).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(decoder, token_ids).backward()
        optimizer.step()
    assert loss(decoder, token_ids).item() < 0.05 * first


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [2, 3 heads, 10, 8], keys of the same shape, energy; all of them wanting gradients."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 10, 8, dtype=torch.float64)
    return q.requires_grad_(), k.clone().requires_grad_(), torch.randn(3, 8, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_the_additive_score_has_the_gradients_of_its_formula_however_it_is_sliced(monkeypatch, rows):
    q, k, energy = pairs()
    monkeypatch.setattr(scores_module, "MAX_PAIR_ELEMENTS", rows * k.numel())
    weights = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    found = torch.autograd.grad((additive(q, k, energy) * weights).sum(), (q, k, energy))
    whole = torch.einsum("bhqkd,hd->bhqk", torch.tanh(q[..., :, None, :] + k[..., None, :, :]), energy)
    expected = torch.autograd.grad((whole * weights).sum(), (q, k, energy))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_additive_score_keeps_no_pair_for_the_backward_pass(monkeypatch):
    q, k, energy = pairs()
    monkeypatch.setattr(scores_module, "MAX_PAIR_ELEMENTS", 2 * k.numel())
    kept: list[int] = []
    rooms: set[int] = set()
    computed: list[int] = []
    tanh = scores_module._tanh

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    def counted(q: torch.Tensor, k: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        rooms.add(room.numel())
        found = tanh(q, k, room)
        computed.append(found.numel())
        return found

    monkeypatch.setattr(scores_module, "_tanh", counted)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score = additive(q, k, energy)
    score.sum().backward()
    assert kept == [q.numel(), k.numel(), energy.numel()]
    assert computed == [2 * k.numel()] * 10  # two of ten queries at a time; each slice forward, and again backward
    assert rooms == {2 * k.numel()}
