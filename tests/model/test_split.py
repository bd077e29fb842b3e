"""A decoder split over processes: together its parts say what the whole says, in every family."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.dense import DenseCausalAttention
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.errors import ConfigError
from model.split import own_config, split_decoder
from tests.parity.models import FAMILIES, write

pytestmark = pytest.mark.fast


class Threads:
    """Processes played by threads, which meet at every word that they exchange."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size)
        self.said: list[Tensor | None] = [None] * world_size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.said[rank] = x
        self.barrier.wait(60)
        everything = list(self.said)
        self.barrier.wait(60)
        return everything


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.world_size = threads, rank, threads.world_size

    def add_up(self, x: Tensor) -> Tensor:
        return torch.stack(self.threads.exchange(self.rank, x)).sum(dim=0)

    def gather(self, x: Tensor) -> list[Tensor]:
        return self.threads.exchange(self.rank, x)


def together(world_size: int, compute: Callable[[Member], Tensor]) -> list[Tensor]:
    threads, found = Threads(world_size), {}

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                found[rank] = compute(Member(threads, rank))
        except BaseException:
            threads.barrier.abort()
            raise

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [found[rank] for rank in range(world_size)]


def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    attend = DenseCausalAttention(1, len(ids))
    return decoder.logits(decoder(ids, torch.arange(len(ids)), attend))


def assert_parts_say_what_the_whole_says(whole: Decoder, world_size: int) -> None:
    ids = torch.randint(3, 290, (24,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = logits(whole, ids)
    parts = together(world_size, lambda member: logits(split_decoder(whole, member, "cpu"), ids))
    for part in parts:
        torch.testing.assert_close(part, expected, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(part, parts[0]) for part in parts)


@pytest.mark.parametrize("name", [*FAMILIES, "llama, biases"])
def test_two_halves_of_every_family_say_what_the_whole_says(name, tmp_path):
    write(name, tmp_path)
    assert_parts_say_what_the_whole_says(load_checkpoint(tmp_path), 2)


SMALL = ModelConfig(
    vocab_size=301, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
OWN = {
    "a vocabulary that cannot be halved": SMALL,
    "one kv head, which both halves need": replace(SMALL, num_kv_heads=1),
    "one kv head, and norms over whole projections": replace(SMALL, num_kv_heads=1, qk_norm="projection"),
    "learned sinks": replace(SMALL, sink_logits=True, attention_scale=0.5),
    "multiplicative scores": replace(SMALL, attention="multiplicative"),
    "additive scores": replace(SMALL, attention="additive"),
    "experts with biases": replace(
        SMALL, num_experts=3, num_experts_per_token=2, expert_intermediate_size=10, mlp_bias=True, dense_layers=(1,)
    ),
}


def random_decoder(config: ModelConfig) -> Decoder:
    generator = torch.Generator().manual_seed(3)
    decoder = Decoder(config).requires_grad_(False)
    decoder.init_weights(generator, std=0.2)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "norm.weight", "sinks")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


@pytest.mark.parametrize("config", OWN.values(), ids=OWN.keys())
def test_two_halves_of_our_own_variations_say_what_the_whole_says(config):
    assert_parts_say_what_the_whole_says(random_decoder(config), 2)


def test_four_parts_share_two_kv_heads():
    assert_parts_say_what_the_whole_says(random_decoder(SMALL), 4)


def test_a_part_holds_its_share_of_the_weights_and_nothing_that_it_was_cut_from():
    whole = random_decoder(replace(SMALL, tie_word_embeddings=False))
    part = split_decoder(whole, HalfOfTwo(), "cpu")
    for name, parameter in part.layers[0].named_parameters():
        numbers = whole.get_parameter(f"layers.0.{name}").numel()
        assert parameter.numel() == (numbers if "norm" in name else numbers // 2), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert part.head.weight.shape == (151, 32)


class HalfOfTwo:
    rank, world_size = 1, 2


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [
        (SMALL, 3, "num_heads \\(4\\) cannot be split over 3"),
        (replace(SMALL, intermediate_size=49), 2, "intermediate_size \\(49\\)"),
        (replace(SMALL, num_heads=6, num_kv_heads=3), 2, "num_kv_heads \\(3\\)"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(config, world_size, words):
    with pytest.raises(ConfigError, match=words):
        own_config(config, world_size)


def test_a_folded_decoder_is_not_split():
    whole = random_decoder(replace(SMALL, attention="multiplicative"))
    whole.fold_scores()
    with pytest.raises(ConfigError, match="before its scores are folded"):
        split_decoder(whole, HalfOfTwo(), "cpu")
