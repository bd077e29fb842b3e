"""How fast each kernel is: bytes or operations a second, and the part of what the card does in a copy or a product."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.attention.paged import PagedStep
from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.bench.gpu.models import read_shape
from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.bench.gpu.timing import Card, measure_card, seconds
from model.config import ModelConfig
from model.kernels.activation import gated
from model.kernels.int8 import int8_linear
from model.kernels.norm import add_rms_norm
from model.kernels.one_row import one_row_linear
from model.kernels.rope import rope_and_store
from model.kernels.sampling import sample

BLOCK_SIZE = 16


def run(results: Results, scale: Scale) -> None:
    """One row a kernel and size."""
    device = torch.device(scale.device)
    card = measure_card(device, scale.dtype, scale.copy_bytes, scale.product_size)
    if results.missing(["the card"]):
        results.add("the card", gb_s=card.bandwidth / 1e9, tflop_s=card.products / 1e12)
    for name, measure in kernels(scale, device).items():
        if results.missing([name]):
            with results.row(name) as row:
                row |= rates(*measure(), card, device)


def rates(function: Callable[[], object], moved: float, operations: float, card: Card, device: torch.device) -> Any:
    """moved: the bytes that must be read and written; operations: 0 where the bytes are what counts."""
    took = seconds(function, device)
    row = {"us": 1e6 * took, "gb_s": moved / took / 1e9, "of_copy": moved / took / card.bandwidth}
    if operations:
        row |= {"tflop_s": operations / took / 1e12, "of_product": operations / took / card.products}
    return row


Measured = tuple[Callable[[], object], float, float]


def kernels(scale: Scale, device: torch.device) -> dict[str, Callable[[], Measured]]:
    """Name -> what makes a kernel's inputs, and gives a call of it with its bytes and operations."""
    named: dict[str, Callable[[], Measured]] = {}
    dtype, long = scale.dtype, scale.long_context
    small, large = read_shape(scale.small)[1], read_shape(scale.large)[1]
    for which, config in (("0.6B", small), ("8B", large)):
        crowds = [*((batch, scale.context) for batch in scale.batches), (scale.crowd, long), (1, 8 * long)]
        for batch, context in crowds:
            name = f"decode attention, {which}, {batch} x {context}"
            named[name] = partial(decode, config, batch, context, dtype, device)
        for past, new in ((0, long), (long // 2, long // 2)):
            name = f"prefill attention, {which}, {new} behind {past}"
            named[name] = partial(prefill, config, past, new, dtype, device)
    for rows in (*scale.batches, scale.token_budget):
        for what, measure in (("norm", norm), ("gate", gate), ("rope and store", rope)):
            named[f"{what}, {rows} rows"] = partial(measure, large, rows, dtype, device)
    for rows in scale.batches:
        named[f"torch's product, gate and up, {rows} rows"] = partial(product, large, rows, dtype, device)
        for top_p in (1.0, 0.9):
            named[f"sampling, {rows} rows, top p {top_p}"] = partial(draws, small, rows, top_p, dtype, device)
    for weights in ("dense", "int8"):
        named[f"one row's product, gate and up, {weights}"] = partial(one_row, large, weights, dtype, device)
    for rows in (16, 64):
        named[f"int8 product, gate and up, {rows} rows"] = partial(int8, large, rows, dtype, device)
    return named


def decode(config: ModelConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """One new token for each of `batch` sequences of `context` tokens."""
    function = _attention(config, [(context - 1, 1)] * batch, dtype, device)
    moved = 2 * batch * context * config.num_kv_heads * config.head_dim * dtype.itemsize
    return function, moved, 0.0


def prefill(config: ModelConfig, past: int, new: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """`new` tokens of one sequence behind `past` that are cached."""
    function = _attention(config, [(past, new)], dtype, device)
    pairs = new * past + new * (new + 1) // 2
    moved = 2 * (past + new) * config.num_kv_heads * config.head_dim * dtype.itemsize
    return function, moved, 4.0 * pairs * config.num_heads * config.head_dim


def _attention(
    config: ModelConfig, lengths: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Blocks lie in any order, as they do in a cache that has been used."""
    blocks = [-(-(past + new) // BLOCK_SIZE) for past, new in lengths]
    free = (torch.randperm(sum(blocks)) + 1).tolist()
    tables = [[free.pop() for _ in range(count)] for count in blocks]
    plan = AttentionPlan.build(BLOCK_SIZE, [past for past, _ in lengths], [new for _, new in lengths], tables)
    step = PagedStep.planned(plan, config.group_size, device)
    shape = ((sum(blocks) + 1) * BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(sum(new for _, new in lengths), config.num_heads, config.head_dim, device=device, dtype=dtype)
    scores = Scores(config, 0)
    return lambda: step.attend(scores, q, keys, values)


def norm(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """Norm behind a residual addition: reads two rows, writes two."""
    x, residual = (torch.randn(rows, config.hidden_size, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(config.hidden_size, device=device, dtype=dtype)
    return lambda: add_rms_norm(x, residual, weight, 1e-5), 4.0 * x.numel() * dtype.itemsize, 0.0


def gate(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """The gated activation: reads two numbers for each that it writes."""
    wide = torch.randn(rows, 2 * config.intermediate_size, device=device, dtype=dtype)
    return lambda: gated(wide, "silu"), 1.5 * wide.numel() * dtype.itemsize, 0.0


def rope(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """Turn and store: reads a projection, writes it."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype)
    tables = tuple(torch.randn(rows, 1, dim, device=device, dtype=dtype) for _ in range(2))
    keys, values = (torch.empty(rows, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    slots = torch.randperm(rows, device=device)
    moved = 2.0 * (qkv.numel() + tables[0].numel()) * dtype.itemsize
    return lambda: rope_and_store(qkv, heads, keys, values, slots, (tables[0], tables[1]), None, 1e-6), moved, 0.0


def product(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """What most of a decode step is: a few rows through a wide matrix, by torch."""
    x = torch.randn(rows, config.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(2 * config.intermediate_size, config.hidden_size, device=device, dtype=dtype)
    moved = float(weight.numel() * dtype.itemsize)
    return lambda: torch.nn.functional.linear(x, weight), moved, 2.0 * rows * weight.numel()


def int8(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """The same by our kernel, from weights of half the bytes."""
    x = torch.randn(rows, config.hidden_size, device=device, dtype=dtype)
    shape = (2 * config.intermediate_size, config.hidden_size)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scale = torch.rand(len(weight), device=device)
    return lambda: int8_linear(x, weight, scale), float(weight.numel()), 2.0 * rows * weight.numel()


def one_row(config: ModelConfig, weights: str, dtype: torch.dtype, device: torch.device) -> Measured:
    """Gate and up projection of one row: reads the weights."""
    x = torch.randn(1, config.hidden_size, device=device).to(dtype)
    shape = (2 * config.intermediate_size, config.hidden_size)
    if weights == "dense":
        weight, scale = torch.randn(shape, device=device).to(dtype), None
    else:
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scale = torch.rand(len(weight), device=device)
    return lambda: one_row_linear(x, weight, scale), float(weight.nbytes), 2.0 * weight.numel()


def draws(config: ModelConfig, rows: int, top_p: float, dtype: torch.dtype, device: torch.device) -> Measured:
    """A token for each of `rows`: reads the logits, at least once."""
    logits = torch.randn(rows, config.vocab_size, device=device).to(dtype)
    index = torch.arange(rows, device=device)
    ones = torch.ones(rows, device=device)
    asked = (0.6 * ones, 0 * index, top_p * ones, 0 * ones, index, index)
    return lambda: sample(logits, *asked), float(logits.numel() * dtype.itemsize), 0.0
