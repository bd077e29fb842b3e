"""Every kernel against the same in fp32 and plain torch, on fresh random inputs, in each dtype it serves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention.paged import PagedAttention
from model.attention.plan import AttentionPlan
from model.attention.reference import ReferenceAttention
from model.attention.scores import Attend, Scores
from model.bench.gpu import engines
from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.cache.pool import FP8, KVPool
from model.config import ModelConfig
from model.kernels.activation import gated, gated_torch
from model.kernels.decodes import place_decodes, place_decodes_torch
from model.kernels.int8 import int8_linear, int8_linear_torch
from model.kernels.norm import add_rms_norm, add_rms_norm_torch
from model.kernels.one_row import one_row_linear, one_row_linear_torch
from model.kernels.rope import rope_and_store, rope_and_store_torch
from model.kernels.sampling import sample
from model.sampling.draw import draw, drop_unlikely, keyed_uniforms, truncate

# The largest error over the largest number: sums of fp32 in another order; what the narrow dtypes round.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BLOCK_SIZE = 16

HEADS = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=64,
    max_position_embeddings=4096,
)  # fmt: skip
VARIATIONS = {
    "plain": HEADS,
    "window and sink tokens": replace(HEADS, sliding_window=70, num_sink_tokens=5),
    "soft cap": replace(HEADS, attention_soft_cap=5.0),
    "learned sinks": replace(HEADS, sink_logits=True),
    "a head each, of 80": replace(HEADS, num_kv_heads=8, head_dim=80),
}
# (tokens cached before, new tokens) of each sequence, decodes first; at the scale of a rehearsal, and beyond it.
SEQUENCES = [(5, 1), (300, 1), (0, 30), (44, 21)]
MORE_SEQUENCES = [(1023, 1), (255, 1), (3000, 1), (0, 513), (777, 300)]

DRAWS = "draws equal to the sampler's definition"
NUMBERS = "what a graph makes of three numbers a sequence"

Pair = tuple[Tensor, Tensor]


def run(results: Results, scale: Scale) -> None:
    """One row a kernel, variation and dtype: its relative error, and whether that is within tolerance."""
    device = torch.device(scale.device)
    for dtype in scale.check_dtypes:
        for name, compute in cases(scale, dtype, device):
            full = f"{name}, {str(dtype).removeprefix('torch.')}"
            if results.missing([full]):
                with results.row(full) as row:
                    found, expected = compute()
                    row |= {"relative_error": relative_error(found, expected), "tolerance": TOLERANCE[dtype]}
                    row["ok"] = row["relative_error"] <= row["tolerance"]
    if results.missing([DRAWS]):
        with results.row(DRAWS) as row:
            row |= check_sampling(device)
    if results.missing([NUMBERS]):
        with results.row(NUMBERS) as row:
            row["ok"] = check_decodes(device)
    engines.run(results, scale)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number; NaN anywhere, or another shape, is infinitely wrong."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def cases(scale: Scale, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """Name, and what computes what the kernel found and what was to be expected."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    on_card = device.type == "cuda"
    sequences = [*MORE_SEQUENCES[:3], *SEQUENCES, *MORE_SEQUENCES[3:]] if on_card else SEQUENCES
    for name, config in VARIATIONS.items():
        yield f"attention, {name}", partial(check_attention, config, sequences, normal, dtype)
    yield "attention, an fp8 cache", partial(check_attention, HEADS, sequences, normal, FP8)
    for rows, size in ((5, 576), (33, 4096)) if on_card else ((5, 48),):
        yield f"norm of {rows} x {size}", partial(check_norm, normal, rows, size)
        yield f"gate of {rows} x {size}", partial(check_gate, normal, rows, size)
    yield "rope and store", partial(check_rope, normal)
    for rows in (1, 7, 64):
        yield f"int8 product of {rows} rows", partial(check_int8, normal, rows, 4096 if on_card else 200)
    for depth in (576, 4096, 14336) if on_card else (200,):
        yield f"one row of {depth}", partial(check_one_row, normal, depth)


def check_attention(
    config: ModelConfig, lengths: list[tuple[int, int]], normal: Callable[..., Tensor], cache: torch.dtype
) -> Pair:
    """Decodes and prefills in one step, over blocks in any order, with NaN in whatever is not theirs. The oracle gets
    keys and values as a cache in this dtype has rounded them.
    """
    blocks = [-(-(past + new) // BLOCK_SIZE) for past, new in lengths]
    free = (torch.randperm(sum(blocks)) + 1).tolist()
    tables = [[free.pop() for _ in range(count)] for count in blocks]
    plan = AttentionPlan.build(BLOCK_SIZE, [past for past, _ in lengths], [new for _, new in lengths], tables)
    num_new = sum(new for _, new in lengths)
    qkv = normal(num_new, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
    scores = Scores(config, 0).to(q.device)
    if scores.sinks is not None:
        scores.sinks.data.normal_()
    past = [(slots_of(table, count), count) for table, (count, _) in zip(tables, lengths, strict=True)]
    kept = [(normal(count, config.num_kv_heads, config.head_dim), normal(count, *k.shape[1:])) for _, count in past]

    def attend(backend: type[Attend], given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        pool = KVPool(config, sum(blocks), BLOCK_SIZE, dtype, q.device)
        pool.keys[:, BLOCK_SIZE:], pool.values[:, BLOCK_SIZE:] = torch.nan, torch.nan
        for (slots, _), (keys, values) in zip(past, kept, strict=True):
            pool.store(0, slots.to(q.device), given(keys), given(values))
        out: Tensor = backend(plan, pool)(scores, q.to(given(k).dtype), given(k), given(v))  # type: ignore[call-arg]
        return out

    with torch.no_grad():
        found = attend(PagedAttention, lambda x: x, cache)
        return found, attend(ReferenceAttention, lambda x: x.to(cache).float(), torch.float32)


def slots_of(table: list[int], count: int) -> Tensor:
    """Where the first `count` tokens of a sequence lie."""
    return torch.tensor([table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(count)]).long()


def check_norm(normal: Callable[..., Tensor], rows: int, size: int) -> Pair:
    """Norm behind a residual addition. The stream is rounded in between, in the oracle too."""
    x, residual, weight = normal(rows, size), normal(rows, size), normal(size)
    added = (residual + x).float()
    return add_rms_norm(x, residual, weight, 1e-5), add_rms_norm_torch(None, added, weight.float(), 1e-5)


def check_gate(normal: Callable[..., Tensor], rows: int, size: int) -> Pair:
    """The gated activation."""
    wide = normal(rows, 2 * size)
    return gated(wide, "silu"), gated_torch(wide.float(), "silu")


def check_rope(normal: Callable[..., Tensor]) -> Pair:
    """Queries, and the keys and values that lie in the cache afterwards, in one tensor."""
    tokens, heads, kv_heads, dim = 9, 6, 2, 64
    qkv, norms = normal(tokens, (heads + 2 * kv_heads) * dim), (normal(dim), normal(dim))
    rope = (normal(tokens, 1, dim), normal(tokens, 1, dim))
    slots = torch.randperm(40, device=qkv.device)[:tokens]

    def compute(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        keys, values = (torch.zeros(40, kv_heads, dim, dtype=dtype, device=qkv.device) for _ in range(2))
        tables, weights = tuple(t.to(dtype) for t in rope), tuple(t.to(dtype) for t in norms)
        q = function(qkv.to(dtype), heads, keys, values, slots, tables, weights, 1e-6)
        return torch.cat([q.flatten(), keys.flatten(), values.flatten()])

    return compute(rope_and_store, qkv.dtype), compute(rope_and_store_torch, torch.float32)


def check_int8(normal: Callable[..., Tensor], rows: int, depth: int) -> Pair:
    """A product with int8 weights."""
    x, channels = normal(rows, depth), depth // 2 + 1
    weight = torch.randint(-127, 128, (channels, depth), device=x.device, dtype=torch.int8)
    scale = torch.rand(channels, device=x.device) / depth
    return int8_linear(x, weight, scale), int8_linear_torch(x.float(), weight, scale)


def check_one_row(normal: Callable[..., Tensor], depth: int) -> Pair:
    """A product of one row, behind it the same with int8 weights."""
    x, channels = normal(1, depth), 301
    dense = normal(channels, depth)
    int8 = torch.randint(-127, 128, (channels, depth), device=x.device, dtype=torch.int8)
    scale = torch.rand(channels, device=x.device) / 50
    found = one_row_linear(x, dense), one_row_linear(x, int8, scale)
    expected = one_row_linear_torch(x.float(), dense), one_row_linear_torch(x.float(), int8, scale)
    return torch.cat(found), torch.cat(expected)


def check_sampling(device: torch.device) -> dict[str, Any]:
    """Rows of all kinds, each drawn by the kernel and by the definition. One in a hundred may fall on a border."""
    count, vocab_size = (256, 151_936) if device.type == "cuda" else (4, 1300)
    logits = 3 * torch.randn(count, vocab_size, device=device)
    index = torch.arange(count, device=device)
    some = torch.rand(3, count, device=device)
    temperature, top_k, top_p, min_p = 0.2 + some[0], 40 * (index % 2), 0.5 + some[1] / 2, some[2] / 1e3
    scaled = truncate(drop_unlikely(logits / temperature[:, None], min_p), top_k, top_p)
    seeds, positions = ((index * factor).cpu().numpy().astype(np.uint64) for factor in (7919, 3))
    expected, _ = draw(scaled, torch.from_numpy(keyed_uniforms(seeds, positions)).to(device))
    found, told = sample(logits, temperature, top_k, top_p, min_p, index * 7919, 3 * index.int())
    equal = int((found == expected).sum())
    return {"rows": count, "equal": equal, "ok": torch.equal(told, found) and equal >= 0.99 * count}


def check_decodes(device: torch.device) -> bool:
    """Rows in all states: known tokens and tokens of the step before, decodes and padding."""
    rows, width = 250, 40
    numbers = torch.randint(-rows, 100_000, (3, 256), dtype=torch.int32, device=device)
    numbers[1] = torch.randint(-1, BLOCK_SIZE * width, (256,), device=device)
    numbers[2].abs_()
    drawn = torch.randint(100_000, (rows,), device=device)
    made = []
    for place in (place_decodes, place_decodes_torch):
        tables, lens = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((rows, width), (rows,)))
        token_ids, positions, slots = torch.zeros(3, rows, dtype=torch.int64, device=device)
        place(numbers, drawn, tables, token_ids, positions, slots, lens, block_size=BLOCK_SIZE)
        made.append(torch.cat([tables.flatten(), token_ids, positions, slots, lens]))
    return torch.equal(*made)
