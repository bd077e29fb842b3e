"""Score functions as parts of a decoder: what they start as, what folding leaves of them, how they are stored."""

import json

import pytest
import torch

from model.attention.dense import DenseCausalAttention
from model.attention.scores import Scores, additive
from model.checkpoint import load_checkpoint, save_checkpoint
from model.decoder import Decoder
from model.errors import CheckpointError, ConfigError
from tests.attention.oracle import config, randomize
from tests.attention.test_dense import KINDS

pytestmark = pytest.mark.fast

SHAPES = {
    "grouped heads": {},
    "a head each, biases": {"num_kv_heads": 4, "qkv_bias": True},
    "one key/value head, no rotary positions": {"num_kv_heads": 1, "rope": None},
    "biases, window, sinks, cap": {
        "qkv_bias": True, "sliding_window": 5, "num_sink_tokens": 2, "sink_logits": True, "attention_soft_cap": 4.0,
    },
}  # fmt: skip


def random_decoder(**options: object) -> Decoder:
    decoder = Decoder(config(**options)).requires_grad_(False)
    randomize(decoder, torch.Generator().manual_seed(0), std=0.15)
    return decoder


def logits(decoder: Decoder, length: int = 20) -> torch.Tensor:
    token_ids = torch.randint(96, (length,), generator=torch.Generator().manual_seed(length))
    return decoder.logits(decoder(token_ids, torch.arange(length), DenseCausalAttention(1, length)))


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folding_changes_nothing(attention, shape):
    decoder = random_decoder(attention=attention, **shape)
    before = logits(decoder)
    decoder.fold_scores()
    torch.testing.assert_close(logits(decoder), before, atol=1e-5, rtol=0)
    assert all(layer.scores.query_projection is None for layer in decoder.layers)


def test_a_folded_multiplicative_score_is_a_dot_product_that_fused_kernels_compute():
    decoder = random_decoder(attention="multiplicative")
    decoder.fold_scores()
    assert all(layer.scores.is_plain for layer in decoder.layers)
    assert not any(list(layer.scores.parameters()) for layer in decoder.layers)


def test_a_fresh_multiplicative_score_is_near_the_scaled_dot_product():
    scores = Scores(config(attention="multiplicative"), 0)
    scores.init_weights(torch.Generator().manual_seed(0))
    q, k = torch.randn(2, 50, 4, 8, generator=torch.Generator().manual_seed(1))
    projected, _ = scores.project(q, k)
    found = scores(projected.transpose(0, 1), k.transpose(0, 1))
    expected = Scores(config(), 0)(q.transpose(0, 1), k.transpose(0, 1))
    assert (found - expected).std() < 0.2 * expected.std()


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_saving_and_loading_is_the_identity(tmp_path, attention, shape):
    decoder = random_decoder(attention=attention, **shape)
    save_checkpoint(decoder, tmp_path, torch.float32)
    plain = attention == "scaled_dot_product" and shape == {}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == ("llama" if plain else "attendant")
    copy = load_checkpoint(tmp_path)
    assert copy.config == decoder.config
    saved, loaded = dict(decoder.named_parameters()), dict(copy.named_parameters())
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(logits(copy), logits(decoder))


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_an_additive_score_has_the_same_bits_however_many_are_computed(head_dim):
    torch.manual_seed(0)
    q, k = torch.randn(5, 4, 16, head_dim), torch.randn(5, 4, 64, head_dim)
    energy = torch.randn(4, head_dim)
    together = additive(q, k, energy)
    for i in range(5):
        assert torch.equal(additive(q[i], k[i], energy), together[i])
        assert torch.equal(additive(q[i, :, 3:4], k[i, :, :7], energy), together[i, :, 3:4, :7])


@pytest.mark.parametrize("attention", KINDS)
def test_int8_with_biases_keeps_the_logits_close(attention):
    decoder = random_decoder(attention=attention, qkv_bias=True, output_bias=True, mlp_bias=True)
    decoder.fold_scores()
    expected = logits(decoder)
    decoder.quantize()
    found = logits(decoder)
    assert not torch.equal(found, expected)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.98


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "subtractive"}, "attention must be one of scaled_dot_product, multiplicative, additive"),
        ({"attention_scale": 0.0}, "attention_scale must be a number above 0"),
        ({"attention_soft_cap": -1.0}, "attention_soft_cap must be a number above 0"),
        ({"sliding_window": 0}, "sliding_window must be a whole number of at least 1"),
        ({"num_sink_tokens": 2}, "num_sink_tokens needs a sliding_window"),
        ({"sliding_window": 4, "num_sink_tokens": -1}, "num_sink_tokens must be a whole number of at least 0"),
        ({"attention": "additive", "qk_norm": "head"}, "qk_norm 'head' is for the scaled dot product"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        config(**options)


def test_a_decoder_that_was_folded_for_serving_is_not_saved(tmp_path):
    decoder = Decoder(config(attention="multiplicative"))
    decoder.init_weights(torch.Generator().manual_seed(0))
    decoder.fold_scores()
    with pytest.raises(CheckpointError, match=r"no 'layers\.0\.scores\.query_projection' any more"):
        save_checkpoint(decoder, tmp_path / "folded")
