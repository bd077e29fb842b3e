"""What this machine could do at best: its own memory bandwidth and product rates, measured, and what a step needs.

A step cannot be faster than reading what it must read, nor than computing what it must compute (Williams, Waterman and
Patterson 2009). The count leaves out norms, quantization scales and every activation, and lets reading and computing
overlap fully, so the true limit is lower. Weights that fit the last-level cache can beat it, as they need no DRAM.
"""

import argparse
import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from model.bench import report
from model.config import CacheDtype, ModelConfig

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
CACHE_BYTES = {
    "fp32": 4,
    "bf16": 2,
    "int8": 2,
    "fp8": 1,
}  # what a cache needs for that kind of weights, or is asked for
ATTENTION = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}  # the products that attention is computed in
STREAM_BYTES = 512 << 20
SIZES = (512, 1024, 2048)


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second read from DRAM. rates: dtype -> multiplications and additions a second, of products."""

    bandwidth: float
    rates: Mapping[str, float]

    def or_better(self, other: "Machine") -> "Machine":
        """The best of two measurements: what disturbed one of them is no limit of the machine."""
        rates = {dtype: max(rate, other.rates[dtype]) for dtype, rate in self.rates.items()}
        return Machine(max(self.bandwidth, other.bandwidth), rates)


@dataclass(frozen=True)
class Work:
    """What one step must do. linear, attention: multiplications and additions, counted apart."""

    read_bytes: float
    linear: float
    attention: float

    def seconds(self, machine: Machine, dtype: str) -> float:
        """The least time that this work takes there."""
        computing = self.linear / machine.rates[dtype] + self.attention / machine.rates[ATTENTION[dtype]]
        return max(self.read_bytes / machine.bandwidth, computing)


def layer_weights(model: ModelConfig) -> int:
    """Numbers in the matrices of all layers that a token goes through: of experts only those that it is sent to."""
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections = 3 if model.gated_mlp else 2
    dense_layers = len(model.dense_layers) if model.num_experts else model.num_layers
    expert_sizes = model.num_experts + model.num_experts_per_token * projections * model.expert_intermediate_size
    return model.hidden_size * (
        model.num_layers * (2 * query + 2 * kv)
        + dense_layers * projections * model.intermediate_size
        + (model.num_layers - dense_layers) * expert_sizes
    )


def attended(model: ModelConfig, context: int) -> int:
    """Tokens that the newest of `context` tokens attends to, added up over all layers."""
    windowed = model.num_layers - len(model.full_attention_layers) if model.sliding_window else 0
    return (model.num_layers - windowed) * context + windowed * min(context, model.sliding_window or context)


def head_weights(model: ModelConfig) -> int:
    """Numbers in the head. The embedding is looked up, not multiplied, so a head tied to it counts once."""
    return model.vocab_size * model.hidden_size


def cache_bytes(model: ModelConfig, dtype: str, cache: CacheDtype) -> float:
    """Of a number in the cache: in int8 with its part of the scale."""
    return 1 + 2 / model.head_dim if cache == "int8" else CACHE_BYTES[dtype if cache == "auto" else cache]


def decode_work(model: ModelConfig, dtype: str, batch: int, context: int, cache: CacheDtype = "auto") -> Work:
    """One decode step of `batch` requests, each over `context` tokens of cache."""
    weights = layer_weights(model) + head_weights(model)
    seen = batch * attended(model, context)
    numbers = 2 * model.num_kv_heads * model.head_dim * seen
    return Work(
        read_bytes=WEIGHT_BYTES[dtype] * weights + cache_bytes(model, dtype, cache) * numbers,
        linear=2 * weights * batch,
        attention=4 * model.num_heads * model.head_dim * seen,
    )


def prefill_work(model: ModelConfig, dtype: str, batch: int, length: int) -> Work:
    """The prompts of `batch` requests at once, `length` tokens each: every token attends to those before it."""
    weights = layer_weights(model) + head_weights(model)
    seen = batch * sum(attended(model, context) for context in range(1, length + 1))
    return Work(
        read_bytes=WEIGHT_BYTES[dtype] * weights,
        linear=2 * batch * (layer_weights(model) * length + head_weights(model)),  # the head: once a prompt
        attention=4 * model.num_heads * model.head_dim * seen,
    )


def decode_ceiling(
    model: ModelConfig, machine: Machine, dtype: str, batch: int, context: int, cache: CacheDtype = "auto"
) -> float:
    """Tokens a second that no engine can pass here."""
    return batch / decode_work(model, dtype, batch, context, cache).seconds(machine, dtype)


def prefill_ceiling(model: ModelConfig, machine: Machine, dtype: str, batch: int, length: int) -> float:
    """Prompt tokens a second that no engine can pass here."""
    return batch * length / prefill_work(model, dtype, batch, length).seconds(machine, dtype)


def measure_machine() -> Machine:
    """The best of several readings and products, as nothing better is known here. It takes a few seconds."""
    return Machine(read_bandwidth(), {dtype: product_rate(dtype) for dtype in WEIGHT_BYTES})


def read_bandwidth() -> float:
    """Bytes a second, over memory far larger than any cache, in huge pages where the system has them."""
    memory = mmap.mmap(-1, STREAM_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    streamed = torch.frombuffer(memory, dtype=torch.float32)
    streamed.fill_(1.0)
    readers: tuple[Callable[[], Tensor], ...] = (streamed.sum, streamed.max, lambda: torch.dot(streamed, streamed))
    return STREAM_BYTES / min(best_seconds(reader) for reader in readers)


def product_rate(dtype: str) -> float:
    """Operations a second of torch's own matrix product, the best of a few sizes."""
    return max(2 * size**3 / best_seconds(product(dtype, size)) for size in SIZES)


def product(dtype: str, size: int) -> Callable[[], Tensor]:
    """A square product in this dtype, ready to run."""
    if dtype == "int8":
        left, right = (torch.randint(-128, 128, (size, size), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(left, right.t())
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size).to(wide) for _ in range(2))
    return lambda: torch.mm(a, b.t())


def best_seconds(function: Callable[[], Tensor], repeats: int = 5) -> float:
    """The shortest of a few runs, after one that does not count."""
    function()
    seen = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seen.append(time.perf_counter() - started)
    return min(seen)


def print_machine(machine: Machine) -> None:
    """One line."""
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in machine.rates.items())
    print(f"DRAM read {machine.bandwidth / 1e9:.1f} GB/s; products, GOP/s: {rates}\n", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print what the machine can do, and write it as JSON where asked."""
    torch.set_num_threads(args.threads)
    machine = measure_machine()
    print_machine(machine)
    report.write(args, {"roofline": asdict(machine)})
