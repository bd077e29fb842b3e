"""Sequences that a native step computes, beside the torch decoder that it must agree with.

`ATTENDANT_TEST_LIBRARY` names another build of the library to test: one with AddressSanitizer.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan, token_positions
from model.cache.packed import PackedPool
from model.cache.pool import KVPool
from model.config import ModelConfig
from model.decoder import Decoder
from model.kernels.cpu import library
from model.kernels.cpu.step import NativeStep

LIBRARY = os.environ.get("ATTENDANT_TEST_LIBRARY")
NATIVE = library.Library(Path(LIBRARY)) if LIBRARY else library.load()
if LIBRARY:
    library.load = lambda: NATIVE

NUM_BLOCKS = 96
OF_NAN = 255  # a byte: bf16 of such bytes is NaN, and so is every scale


def tiny(**changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    }  # fmt: skip
    return ModelConfig(**(shape | changes))


def new_decoder(config: ModelConfig, dtype: str, seed: int = 0) -> Decoder:
    """Random weights that bf16 can hold, biases, norms and sinks included; serving takes them as int8 or bf16."""
    decoder = Decoder(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    decoder.init_weights(generator, std=0.1)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "norm.weight", "sinks")):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter.to(torch.bfloat16))
        if dtype == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
    decoder.fold_scores()
    if dtype == "int8":
        decoder.quantize()
    return decoder


class Scene:
    """A native step over a cache full of NaN, the same decoder in fp32 torch, and some sequences of random tokens."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        *,
        cache: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        **options: object,
    ) -> None:
        decoder = new_decoder(config, dtype)
        self.twin = copy.deepcopy(decoder).float()
        self.pool = PackedPool(config, NUM_BLOCKS, block_size, cache)
        self.pool.memory[:, 1:] = OF_NAN
        self.twin_pool = KVPool(config, NUM_BLOCKS, block_size, torch.float32, torch.device("cpu"))
        self.step = NativeStep(decoder, self.pool, **({"max_tokens": 512, "num_threads": 2} | options))
        self.free = (torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)) + 1).tolist()
        self.block_size = block_size
        self.tables: list[list[int]] = []
        self.token_ids: list[Tensor] = []

    def add(self, length: int) -> int:
        """A new sequence, its blocks taken at random."""
        generator = torch.Generator().manual_seed(100 + len(self.tables))
        self.token_ids.append(torch.randint(self.step.config.vocab_size, (length,), generator=generator))
        self.tables.append([self.free.pop() for _ in range(-(-length // self.block_size))])
        return len(self.tables) - 1

    def batch(self, work: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, AttentionPlan, Tensor]:
        """(sequence, start, stop) of each: what the step takes, with logits of every row."""
        starts, counts = [start for _, start, _ in work], [stop - start for _, start, stop in work]
        plan = AttentionPlan.build(self.block_size, starts, counts, [self.tables[i] for i, _, _ in work])
        token_ids = torch.cat([self.token_ids[i][start:stop] for i, start, stop in work])
        positions = torch.from_numpy(token_positions(starts, plan.query_start_loc))
        return token_ids, positions, plan, torch.arange(len(token_ids))

    def run(self, *work: tuple[int, int, int]) -> Tensor:
        """The native logits of every row, [num_tokens, vocab_size]."""
        return self.step.forward(*self.batch(work)).logits.clone()

    def expected(self, *work: tuple[int, int, int]) -> Tensor:
        """What torch makes of it in fp32."""
        token_ids, positions, plan, _ = self.batch(work)
        with torch.inference_mode():
            return self.twin.logits(self.twin(token_ids, positions, GatheredAttention(plan, self.twin_pool)))
