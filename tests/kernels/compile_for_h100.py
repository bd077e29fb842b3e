"""Compiles every kernel as an H100 would be given it, on a machine without one, and launches nothing.

The interpreter runs kernels as Python: what Triton's compiler refuses, or what needs more of the fast memory than there
is, shows only here. Prints a line of JSON for each case: what was compiled for it, and what it takes of that memory.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from model.attention.paged import PagedStep
from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.bench.gpu.check import HEADS
from model.config import ModelConfig
from model.kernels.activation import Activation, gated
from model.kernels.decodes import place_decodes
from model.kernels.int8 import int8_linear
from model.kernels.norm import add_rms_norm
from model.kernels.one_row import one_row_linear
from model.kernels.rope import rope_and_store
from model.kernels.sampling import sample

SIZES = "steps of all sizes"
FAST_BYTES = 232_448  # that a program may have on an H100
COMPILED: list[tuple[str, int]] = []  # kernels, and the fast memory of each


class MadeUpH100:
    """A driver of Triton's: what is compiled for it is loaded nowhere."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=self.load,
            get_device_properties=lambda device: {"max_shared_mem": FAST_BYTES, "multiprocessor_count": 132},
        )

    def load(self, name: str, binary: bytes, fast_bytes: int, device: int) -> tuple[int, int, int, int, int]:
        """A module, a function, registers, spilled ones, threads."""
        COMPILED.append((name, fast_bytes))
        return 1, 1, 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        """Of compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What would launch a kernel."""
        return lambda *args: None


def attention(config: ModelConfig, dtype: torch.dtype, cache: torch.dtype, longest: int = 300) -> None:
    """A decode and a prefill of one layer."""
    blocks = list(range(1, longest // 16 + 2))
    plan = AttentionPlan.build(16, [longest, 5], [1, 40], [blocks, [1, 2, 3]])
    step = PagedStep.planned(plan, config.group_size, torch.device("cpu"))
    keys, values = (torch.zeros(64, config.num_kv_heads, config.head_dim, dtype=cache) for _ in range(2))
    q = torch.zeros(41, config.num_heads, config.head_dim, dtype=dtype)
    step.attend(Scores(config, 0).to(dtype), q, keys, values)


def steps_of_all_sizes() -> None:
    """Lengths whose block tables and splits are 1, a multiple of 16, and neither; so are rows of products."""
    for longest in (15, 255, 300, 16 * 256 - 1, 5000):
        attention(HEADS, torch.bfloat16, torch.bfloat16, longest)
    for rows in (33, 48, 64):
        product(rows, torch.bfloat16, has_bias=False)


def rope(config: ModelConfig, dtype: torch.dtype, cache: torch.dtype, rotary: int, *, has_norms: bool) -> None:
    """Keys, values and queries of three tokens."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = torch.zeros(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    keys, values = (torch.zeros(16, kv_heads, dim, dtype=cache) for _ in range(2))
    tables = (torch.zeros(3, 1, rotary, dtype=dtype),) * 2 if rotary else None
    norms = (torch.ones(dim, dtype=dtype),) * 2 if has_norms else None
    rope_and_store(qkv, heads, keys, values, torch.arange(3), tables, norms, 1e-6)


def sampled(dtype: torch.dtype) -> None:
    """Three rows of a large vocabulary."""
    numbers, ids = torch.ones(3), torch.arange(3)
    sample(torch.zeros(3, 151_936, dtype=dtype), numbers, ids, numbers, numbers, ids, ids.int())


def placed(rows: int) -> None:
    """Numbers of as many decodes, in tables of 40 blocks."""
    ids = [torch.zeros(rows, dtype=torch.int64) for _ in range(4)]
    numbers, tables = torch.zeros(3, 256, dtype=torch.int32), torch.zeros(rows, 40, dtype=torch.int32)
    place_decodes(numbers, ids[3], tables, *ids[:3], torch.zeros(rows, dtype=torch.int32), block_size=16)


def product(rows: int, dtype: torch.dtype, *, has_bias: bool) -> None:
    """int8 weights of 256 channels."""
    weight, scale = torch.zeros(256, 512, dtype=torch.int8), torch.ones(256)
    int8_linear(torch.zeros(rows, 512, dtype=dtype), weight, scale, torch.zeros(256) if has_bias else None)


def one_row(dtype: torch.dtype, weights: torch.dtype) -> None:
    """Weights of 256 channels, of few inputs and of many."""
    for depth in (576, 14336):
        x, bias = torch.zeros(1, depth, dtype=dtype), torch.zeros(256, dtype=dtype)
        scale = torch.ones(256) if weights == torch.int8 else None
        one_row_linear(x, torch.zeros(256, depth, dtype=weights), scale, bias)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What a served model may ask for: every kernel, dtype and option, the largest heads among them."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    large = replace(HEADS, num_heads=32, num_kv_heads=8, head_dim=128)
    wide = replace(HEADS, num_heads=8, num_kv_heads=4, head_dim=256, attention_soft_cap=50.0, sliding_window=70)
    options = replace(HEADS, sliding_window=70, num_sink_tokens=5, sink_logits=True)
    for name, config, dtype, cache in (
        ("heads of 64", HEADS, bf16, bf16),
        ("heads of 128", large, bf16, bf16),
        ("heads of 128, an fp8 cache", large, bf16, fp8),
        ("heads of 128, fp32", large, fp32, fp32),
        ("heads of 80, a head each", replace(HEADS, num_kv_heads=8, head_dim=80), bf16, bf16),
        ("heads of 256, capped, a window", wide, bf16, bf16),
        ("heads of 256, an fp8 cache", wide, bf16, fp8),
        ("a window, sinks of both kinds", options, bf16, bf16),
        ("many heads to one", replace(HEADS, num_heads=64, num_kv_heads=1), bf16, bf16),
    ):
        yield f"attention, {name}", partial(attention, config, dtype, cache)
    yield SIZES, steps_of_all_sizes
    yield "decodes", partial(placed, 256)
    for dtype, cache in ((bf16, bf16), (bf16, fp8), (fp32, fp32)):
        for rotary, has_norms in ((128, True), (64, False), (0, False)):
            what = f"rope and store, {dtype}, {cache}, {rotary} turn, norms {has_norms}"
            yield what, partial(rope, large, dtype, cache, rotary, has_norms=has_norms)
    for dtype in (bf16, fp32):
        yield f"sampling, {dtype}", partial(sampled, dtype)
        yield f"int8, {dtype}", partial(product, 40, dtype, has_bias=True)
        yield f"one row, {dtype}", partial(one_row, dtype, dtype)
        yield f"one row, {dtype}, int8", partial(one_row, dtype, torch.int8)
        for size in (576, 8192):
            x = torch.zeros(3, size, dtype=dtype)
            yield f"norm of {size}, {dtype}", partial(add_rms_norm, x, x.clone(), x[0].clone(), 1e-5)
        for kind in get_args(Activation):
            yield f"gate, {kind}, {dtype}", partial(gated, torch.zeros(3, 4096, dtype=dtype), kind)


def main(*wanted: str) -> None:
    """Compile those whose name begins with one of these words, or all."""
    driver.set_active(MadeUpH100())  # type: ignore[arg-type]
    for name, compile_it in cases():
        if not wanted or name.startswith(wanted):
            COMPILED.clear()
            compile_it()
            print(json.dumps({"case": name, "compiled": COMPILED}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
