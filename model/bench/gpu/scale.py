"""How large the measurements of a GPU are: as published targets have it, or, to rehearse them without one, tiny."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.bench.shapes import SHAPES


@dataclass(frozen=True)
class Scale:
    """device, dtype: of models and kernels; check_dtypes: those that kernels are checked in.

    small, large: the shapes that stand for 0.6 and 8 billion weights. batches, context, output: requests at once,
    prompt tokens and generated tokens of each. long_context: of one prompt, and of `crowd` sequences to attend to.
    token_budget: of one step. sequences, longest: the nano-vllm workload. copy_bytes, product_size: what the card's own
    rates are measured with.
    """

    device: str
    dtype: torch.dtype
    check_dtypes: tuple[torch.dtype, ...]
    small: Mapping[str, Any]
    large: Mapping[str, Any]
    batches: tuple[int, ...]
    crowd: int
    context: int
    output: int
    long_context: int
    token_budget: int
    sequences: int
    longest: int
    copy_bytes: int
    product_size: int


CARD = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    check_dtypes=(torch.float32, torch.float16, torch.bfloat16),
    small=SHAPES["qwen3-0.6b"],
    large=SHAPES["llama-8b"],
    batches=(1, 64, 256),
    crowd=32,
    context=1024,
    output=64,
    long_context=4096,
    token_budget=8192,
    sequences=256,
    longest=1024,
    copy_bytes=2 << 30,
    product_size=8192,
)

_TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
REHEARSAL = Scale(
    device="cpu",
    dtype=torch.float32,  # bf16 is silently wrong in Triton's interpreter
    check_dtypes=(torch.float32, torch.float16),
    small=SHAPES["qwen3-0.6b"] | _TINY | _HEADS,
    large=SHAPES["llama-8b"] | _TINY | _HEADS,
    batches=(1, 2),
    crowd=3,
    context=9,
    output=3,
    long_context=12,
    token_budget=32,
    sequences=3,
    longest=5,
    copy_bytes=1 << 20,
    product_size=64,
)
