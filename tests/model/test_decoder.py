"""Our decoder computes what `transformers` computes, whole or in pieces."""

import pytest
import torch

from model.attention.dense import DenseCausalAttention
from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.cache.pool import KVPool
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.layers import Int8Linear, Linear
from tests.conftest import write_llama


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path, length, tied):
    model = write_llama(tmp_path, tie_word_embeddings=tied)
    decoder = load_checkpoint(tmp_path)
    token_ids = torch.randint(320, (2, length))
    hidden = decoder(token_ids.flatten(), torch.arange(length).repeat(2), DenseCausalAttention(2, length))
    with torch.no_grad():
        expected = model(token_ids).logits.flatten(0, 1)
    torch.testing.assert_close(decoder.logits(hidden), expected, atol=2e-4, rtol=0)


def test_a_prompt_in_chunks_over_scattered_blocks_gives_the_logits_of_the_whole(tiny_llama):
    directory, model = tiny_llama
    decoder = load_checkpoint(directory)
    token_ids = torch.randint(320, (50,))
    pool = KVPool(decoder.config, 8, 8, torch.float32, torch.device("cpu"))
    table, pieces = [5, 2, 8, 1, 7, 3, 4], []
    for start, stop in ((0, 13), (13, 14), (14, 15), (15, 50)):
        plan = AttentionPlan.build(8, [start], [stop - start], [table])
        hidden = decoder(token_ids[start:stop], torch.arange(start, stop), GatheredAttention(plan, pool))
        pieces.append(decoder.logits(hidden))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces), model(token_ids[None]).logits[0], atol=2e-4, rtol=0)


def test_fresh_weights_depend_on_the_seed_alone():
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        max_position_embeddings=16,
    )  # fmt: skip
    first, second, third = Decoder(config), Decoder(config), Decoder(config)
    for decoder, seed in ((first, 1), (second, 1), (third, 2)):
        decoder.init_weights(torch.Generator().manual_seed(seed))
    weights = [torch.cat([p.flatten() for p in decoder.parameters()]) for decoder in (first, second, third)]
    assert torch.isfinite(weights[0]).all()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_int8_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    linear = Linear(64, 48)
    torch.nn.init.normal_(linear.weight)
    int8 = Int8Linear(linear)
    x = torch.randn(9, 64)
    x[3] *= 1000.0
    whole = int8(x)
    for row in range(9):
        assert torch.equal(int8(x[row : row + 1])[0], whole[row])
    error = (whole - linear(x)).norm(dim=1) / linear(x).norm(dim=1)
    assert error.max() < 0.02


def test_quantizing_keeps_the_logits_close(tiny_llama):
    directory, _ = tiny_llama
    plain, quantized = load_checkpoint(directory), load_checkpoint(directory)
    quantized.quantize()
    token_ids, positions = torch.randint(320, (40,)), torch.arange(40)
    expected = plain.logits(plain(token_ids, positions, DenseCausalAttention(1, 40)))
    logits = quantized.logits(quantized(token_ids, positions, DenseCausalAttention(1, 40)))
    assert not torch.equal(logits, expected)
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).min() > 0.99
