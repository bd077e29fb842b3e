"""The listing that this project grew from, and what of it differs here, one difference a test.

The article defines softmax(Q K^T / sqrt(d_k)) V and then lists one head without a mask. `Article` is that listing's
arithmetic as it was given.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from model.attention.dense import DenseCausalAttention
from model.attention.scores import Scores, explicit_attention, softmax
from model.decoder import DecoderLayer
from tests.attention.oracle import config, randomize

pytestmark = pytest.mark.fast

LENGTH, WIDTH = 6, 32


class Article(nn.Module):
    """Three linear maps of the whole width, a scale of sqrt(d_model) as a bare tensor, a softmax over everything."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_model) for _ in range(3))
        self.scale = torch.sqrt(torch.FloatTensor([d_model]))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(-2, -1) / self.scale, dim=-1)
        return weights @ self.value(x)


def one_head_layer() -> DecoderLayer:
    """A layer of ours in the article's shape: one head as wide as the model, biases, no positions, no norm first."""
    layer = DecoderLayer(
        config(num_heads=1, num_kv_heads=1, head_dim=WIDTH, qkv_bias=True, rope=None, norm_placement="post"), 0
    )
    randomize(layer, torch.Generator().manual_seed(0))
    return layer.requires_grad_(False)


def article_with_the_weights_of(layer: DecoderLayer) -> Article:
    article = Article(WIDTH)
    parts = (article.query, article.key, article.value)
    for part, weight, bias in zip(parts, layer.qkv.weight.split(WIDTH), layer.qkv.bias.split(WIDTH), strict=True):
        part.weight.data, part.bias.data = weight, bias
    return article.requires_grad_(False)


def attended(layer: DecoderLayer, x: Tensor) -> Tensor:
    """What our layer's attention makes of one sequence, before the output projection."""
    seen = []

    def attend(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(DenseCausalAttention(1, LENGTH)(scores, q, k, v))
        return seen[0]

    layer(x, None, attend)
    return seen[0].flatten(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def test_one_head_without_a_mask_gives_the_same_numbers(x):
    layer = one_head_layer()
    q, k, v = (part[None, None] for part in layer.qkv(x).split(WIDTH, dim=-1))
    everything = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)
    ours = explicit_attention(layer.scores, q, k, v, everything)[0, 0]
    torch.testing.assert_close(ours, article_with_the_weights_of(layer)(x))


def test_the_newest_token_sees_everything_and_gets_the_same_numbers_through_our_layer(x):
    layer = one_head_layer()
    torch.testing.assert_close(attended(layer, x)[-1], article_with_the_weights_of(layer)(x)[-1])


def test_every_row_is_the_articles_own_for_the_sequence_that_ends_there(x):
    layer = one_head_layer()
    article = article_with_the_weights_of(layer)
    prefixes = torch.stack([article(x[: row + 1])[-1] for row in range(LENGTH)])
    torch.testing.assert_close(attended(layer, x), prefixes)


def test_the_article_lets_a_token_see_its_future_and_ours_does_not(x):
    layer = one_head_layer()
    article = article_with_the_weights_of(layer)
    changed = x.clone()
    changed[-1] += 1.0
    assert not torch.allclose(article(changed)[0], article(x)[0])
    assert torch.equal(attended(layer, changed)[:-1], attended(layer, x)[:-1])


def test_the_article_scales_by_the_models_width_and_ours_by_a_heads(x):
    """Scores of independent q and k of unit variance have variance d_k. Divided by sqrt(d_k) they stay of size 1 and
    the softmax stays soft, however many heads there are; by sqrt(d_model) they shrink as heads are added, and the
    softmax becomes a plain mean. With one head the two are the same number.
    """
    torch.manual_seed(0)
    for num_heads in (1, 4, 16):
        head_dim = 64 // num_heads
        scores = Scores(config(hidden_size=64, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim), 0)
        q, k = torch.randn(2, num_heads, 500, head_dim)
        theirs = q @ k.transpose(-2, -1) / Article(d_model=64).scale
        assert scores(q, k).std().item() == pytest.approx(1.0, rel=0.05)
        assert theirs.std().item() == pytest.approx(1 / math.sqrt(num_heads), rel=0.05)


def test_the_articles_scale_is_a_tensor_that_the_module_does_not_know_and_ours_a_number():
    article, scores = Article(WIDTH), Scores(config(head_dim=WIDTH), 0)
    assert "scale" not in {**article.state_dict(), **dict(article.named_buffers())}
    assert article.double().scale.dtype == torch.float32  # left behind, as it would be on another device
    article.to("meta")
    assert article.query.weight.device.type == "meta"
    assert article.scale.device.type == "cpu"
    assert isinstance(scores.scale, float)
    assert scores.scale == 1 / math.sqrt(WIDTH)
    for device, dtype in (("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32)):
        q = torch.ones(1, 2, WIDTH, device=device, dtype=dtype)
        found = scores.to(device, dtype)(q, q)
        assert (found.device.type, found.dtype) == (device, dtype)


def test_the_articles_worked_example_has_no_scale_and_is_the_multiplicative_score_with_w_1():
    """Two tokens: alpha_i = exp(q1 . k_i) / (exp(q1 . k_1) + exp(q1 . k_2)), output = alpha_1 v_1 + alpha_2 v_2."""
    scores = Scores(config(num_heads=1, num_kv_heads=1, head_dim=2, attention="multiplicative"), 0)
    scores.query_projection.data = torch.eye(2)[None]
    q = torch.tensor([[[1.0, 2.0]], [[0.5, -1.0]]])  # the second query is the newest, and sees both keys
    k, v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]])
    first, second = math.exp(0.5), math.exp(-1.0)
    alpha = [first / (first + second), second / (first + second)]
    projected, keys = scores.project(q, k)
    row = scores(projected.transpose(0, 1), keys.transpose(0, 1))[:, 1:]
    found = softmax(row, torch.ones(1, 1, 2, dtype=torch.bool), None)
    torch.testing.assert_close(found.flatten(), torch.tensor(alpha))
    out = DenseCausalAttention(1, 2)(scores, projected, keys, v)
    torch.testing.assert_close(out[1, 0], alpha[0] * v[0, 0] + alpha[1] * v[1, 0])
