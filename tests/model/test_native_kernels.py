"""Each native kernel on its own beside its twin in torch, on every instruction set that this machine has."""

import ctypes
import math
import os
import re
import subprocess
import sys
from ctypes import byref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.cache.packed import PackedPool
from model.config import RopeConfig
from model.kernels.cpu import build as build_module
from model.kernels.cpu import library
from model.kernels.cpu.pack import Arena, Matrix, interleave, up
from model.layers import ACTIVATIONS
from model.rotary import Rotary, rotate
from tests.model.native_scene import LIBRARY, NATIVE, OF_NAN, tiny


@pytest.fixture(params=library.INSTRUCTION_SETS)
def kernels(request) -> library.Kernels:
    if request.param not in NATIVE.instruction_sets:
        pytest.skip(f"this machine has no {request.param}")
    return NATIVE.kernels(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WIDTHS = [1, 5, 16, 17, 64, 100]


class Encoded:
    """Rows as a product reads them."""

    def __init__(self, kernels: library.Kernels, x: Tensor, dtype: int) -> None:
        stride = up(x.shape[1], 16) * (1 if dtype == library.INT8 else 2)
        self.data = torch.full((len(x), stride), 77, dtype=torch.uint8)
        self.scale = torch.full((len(x),), 77.0)
        for i, row in enumerate(x):
            out = self.data[i].data_ptr()
            if dtype == library.INT8:
                kernels.encode_int8(row.data_ptr(), len(row), out, stride, self.scale[i:].data_ptr())
            else:
                kernels.encode_bf16(row.data_ptr(), len(row), out, stride // 2)
        self.rows = library.Rows(self.data.data_ptr(), self.scale.data_ptr(), len(x), stride)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_become_int8_as_torch_rounds_them(kernels, width):
    x = random(4, width)
    x[1] = 0.0
    x[2, 0] = 1e30
    encoded = Encoded(kernels, x, library.INT8)
    scale = x.abs().amax(dim=1).clamp(min=1e-12) / 127.0
    assert torch.equal(encoded.scale, scale)
    assert torch.equal(encoded.data[:, :width].int() - 128, (x / scale[:, None]).round().int())
    assert (encoded.data[:, width:] == 128).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_has_no_scale(kernels, bad):
    x = random(3, 37)
    x[1, 20] = bad
    scale = Encoded(kernels, x, library.INT8).scale
    assert scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_become_bf16_as_torch_rounds_them(kernels, width):
    x = torch.cat([random(2, width), torch.full((1, width), math.nan), torch.full((1, width), -math.inf)])
    x[0, 0] = 1.0 + 2.0**-8  # a tie
    encoded = Encoded(kernels, x, library.BF16).data.view(torch.bfloat16)
    torch.testing.assert_close(encoded[:, :width], x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert (encoded[:, width:] == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kernels, kind, width):
    x, weight, bias = random(width) + 3.0, random(width, seed=1), random(width, seed=2)
    norm = library.Norm(weight.data_ptr(), bias.data_ptr() if kind == "layer" else None, 1e-3, library.NORMS[kind])
    out = torch.full((width + 1,), 77.0)
    kernels.normalize(byref(norm), x.data_ptr(), width, out.data_ptr())
    rms = F.rms_norm(x, (width,), weight, 1e-3)
    expected = rms if kind == "rms" else F.layer_norm(x, (width,), weight, bias, 1e-3)
    torch.testing.assert_close(out[:width], expected, atol=2e-5, rtol=1e-5)
    assert out[width] == 77.0
    kernels.normalize(byref(norm), x.data_ptr(), width, x.data_ptr())
    assert torch.equal(x, out[:width])


@pytest.mark.parametrize(("dim", "turning"), [(10, 10), (64, 64), (80, 80), (80, 20), (34, 34)])
def test_rotary_positions(kernels, dim, turning):
    rotary = Rotary(RopeConfig(rotary_dim=turning), dim, 50)
    head = random(dim)
    expected = rotate(head[None, None], *rotary(torch.tensor([37]), torch.tensor([50]), torch.float32))[0, 0]
    cos, sin = rotary.cos[37].clone(), rotary.sin[37].clone()
    kernels.rotate(head.data_ptr(), cos.data_ptr(), sin.data_ptr(), turning // 2)
    torch.testing.assert_close(head, expected, atol=1e-6, rtol=1e-6)


def test_embedding_and_sum(kernels):
    row, out = random(37).bfloat16(), torch.zeros(37)
    kernels.embed(row.data_ptr(), 37, 3.0, out.data_ptr())
    assert torch.equal(out, row.float() * 3.0)
    other = out.clone()
    kernels.add_scaled(out.data_ptr(), other.data_ptr(), 2.0, 37)
    assert torch.equal(out, row.float() * 9.0)


def test_the_odds_of_experts(kernels):
    x, router, odds = random(37), random(5, 37, seed=1), torch.zeros(5)
    kernels.route(x.data_ptr(), router.data_ptr(), 37, 5, odds.data_ptr())
    torch.testing.assert_close(odds, (router @ x).softmax(dim=0), atol=1e-6, rtol=1e-5)


def likeliest(kernels, logits: Tensor) -> tuple[int, float]:
    index, value = ctypes.c_int64(-1), ctypes.c_float(77.0)
    kernels.likeliest(logits.data_ptr(), len(logits), ctypes.addressof(index), ctypes.addressof(value))
    return index.value, value.value


@pytest.mark.parametrize("width", WIDTHS)
def test_the_likeliest_token_is_that_of_torch(kernels, width):
    for seed in range(20):
        logits = random(width, seed=seed)
        assert likeliest(kernels, logits) == (int(logits.argmax()), float(logits.max()))
    assert likeliest(kernels, torch.full((width,), -5.0)) == (0, -5.0)


@pytest.mark.parametrize("place", [0, 16, 36])
def test_a_logit_that_is_no_number_is_told(kernels, place):
    logits = random(37)
    logits[place] = math.nan
    assert math.isnan(likeliest(kernels, logits)[1])
    logits[place] = math.inf
    assert likeliest(kernels, logits) == (place, math.inf)
    assert likeliest(kernels, torch.full((37,), -math.inf))[1] == -math.inf


class Product:
    """A packed linear map and what it makes of rows."""

    def __init__(self, matrix: Matrix, *, gated: bool = False) -> None:
        matrix = interleave(matrix) if gated else matrix.padded()
        self.arena = Arena([(*matrix.weight.shape, matrix.weight.dtype)])
        self.linear = self.arena.pack(matrix)
        self.gated = gated
        self.width = self.linear.panels * library.PANEL // (1 + gated)

    def __call__(self, kernels, x: Tensor, then: int = library.STORE, *, out=None, activation=0, cap=0.0) -> Tensor:
        encoded = Encoded(kernels, x, self.linear.dtype)
        out = torch.full((len(x), self.width), 77.0) if out is None else out
        epilogue = library.Epilogue(out.data_ptr(), self.width, cap, then, activation)
        multiply = kernels.linear_int8 if self.linear.dtype == library.INT8 else kernels.linear_bf16
        for panel in range(self.width // library.PANEL):
            multiply(byref(self.linear), byref(encoded.rows), panel, byref(epilogue), panel + 1)
        return out


def int8_matrix(outputs: int, inputs: int, seed: int = 0, bias: bool = True) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) + 0.01
    return Matrix(weight, scale, random(outputs, seed=seed + 1) if bias else None)


def int8_twin(matrix: Matrix, x: Tensor) -> Tensor:
    """`Int8Linear.forward`, its sums in int64."""
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0
    sums = (x / scale).round().long() @ matrix.weight.long().t()
    out = sums.float() * scale * matrix.scale
    return out if matrix.bias is None else out + matrix.bias


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_int8_products_are_exact_on_every_instruction_set(rows, inputs, outputs, bias):
    matrix, x = int8_matrix(outputs, inputs, bias=bias), random(rows, inputs)
    product, expected = Product(matrix), int8_twin(matrix, x)
    for name in NATIVE.instruction_sets:
        assert torch.equal(product(NATIVE.kernels(name), x)[:, :outputs], expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_int8_values_do_not_saturate(kernels, sign):
    matrix = Matrix(torch.full((32, 512), 127 * sign, dtype=torch.int8), torch.ones(32))
    x = torch.cat([torch.full((1, 512), 1.0), torch.full((1, 512), -1.0)])
    assert torch.equal(Product(matrix)(kernels, x), int8_twin(matrix, x))


@pytest.mark.parametrize("rows", [1, 2, 3, 11, 12, 13, 25])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 16), (33, 17), (70, 100)])
def test_bf16_products(kernels, rows, outputs, inputs):
    matrix = Matrix(random(outputs, inputs).bfloat16(), None, random(outputs, seed=3))
    x = random(rows, inputs, seed=1)
    expected = x.bfloat16().double() @ matrix.weight.double().t() + matrix.bias.double()
    torch.testing.assert_close(Product(matrix)(kernels, x)[:, :outputs].double(), expected, atol=1e-4, rtol=1e-4)


def test_bf16_products_are_the_same_bits_on_every_instruction_set():
    product, x = Product(Matrix(random(70, 200).bfloat16())), random(13, 200, seed=1)
    results = [product(NATIVE.kernels(name), x) for name in NATIVE.instruction_sets]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_row_of_nan_spoils_itself_and_no_other(kernels, dtype):
    product = Product(int8_matrix(40, 30) if dtype == "int8" else Matrix(random(40, 30).bfloat16()))
    x = random(15, 30)
    clean = product(kernels, x)
    x[7, 3] = math.nan
    spoiled = product(kernels, x)
    others = [i for i in range(15) if i != 7]
    assert spoiled[7, :40].isnan().all()
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_row_is_the_same_bits_in_any_number_of_rows(kernels, dtype):
    product = Product(int8_matrix(40, 30) if dtype == "int8" else Matrix(random(40, 30).bfloat16()))
    x = random(29, 30)
    assert torch.equal(product(kernels, x), torch.cat([product(kernels, x[i : i + 1]) for i in range(29)]))


def test_a_product_can_be_added(kernels):
    matrix, x = int8_matrix(40, 30), random(5, 30)
    product = Product(matrix)
    before = random(5, product.width, seed=9)
    expected = before + product(kernels, x)
    assert torch.equal(product(kernels, x, library.ADD, out=before), expected)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations_plain_and_gated(kernels, name):
    matrix = int8_matrix(2 * 45, 30)
    matrix.scale = matrix.scale * 0.05
    x = random(14, 30)
    x[3] *= 100.0  # far out on both sides
    wide = int8_twin(matrix, x)
    gate, other = wide.chunk(2, dim=1)
    code = library.ACTIVATIONS[name]
    plain = Product(matrix)(kernels, x, library.ACTIVATE, activation=code)[:, :90]
    torch.testing.assert_close(plain, ACTIVATIONS[name](wide), atol=2e-6, rtol=2e-6)
    gated = Product(matrix, gated=True)(kernels, x, library.GATE, activation=code)[:, :45]
    torch.testing.assert_close(gated, ACTIVATIONS[name](gate) * other, atol=1e-4, rtol=1e-5)


def test_packed_weights_ask_for_huge_pages_and_may_have_them():
    arena = Arena([(32, 16, torch.bfloat16)])
    linear = arena.pack(Matrix(random(32, 16).bfloat16()))
    regions = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) (.*\n(?:\w+:.*\n)+)", Path("/proc/self/smaps").read_text(), re.MULTILINE
    )
    (region,) = (about for start, end, about in regions if int(start, 16) <= linear.weight < int(end, 16))
    assert region.startswith("rw-p "), "shared pages are small"
    assert " hg" in re.search(r"VmFlags:(.*)", region)[1]


def test_a_soft_cap(kernels):
    matrix, x = int8_matrix(40, 30), random(5, 30)
    capped = Product(matrix)(kernels, x, library.CAP, cap=30.0)[:, :40]
    torch.testing.assert_close(capped, 30.0 * torch.tanh(int8_twin(matrix, x) / 30.0), atol=1e-5, rtol=1e-5)


def of_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache keeps of heads, [..., head_dim]."""
    if dtype == torch.bfloat16:
        return x.bfloat16().float()
    scale = (x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127.0).bfloat16().float()
    return (x / scale).round() * scale


# Attention rounds each weight before it sums the values: in bf16 by 1 in 512 at most, in int8 by 1 in 2^15 of the
# largest.
CLOSE = {torch.bfloat16: {"atol": 3e-3, "rtol": 3e-3}, torch.int8: {"atol": 5e-4, "rtol": 5e-4}}


@pytest.fixture(params=[torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def dtype_of_cache(request) -> torch.dtype:
    return request.param


class Cache:
    """One layer's packed cache full of NaN, with the keys and values of one sequence in blocks in a random order."""

    def __init__(
        self, kernels, k: Tensor, v: Tensor, dtype: torch.dtype, *, heads: int, block_size: int = 16, **options: object
    ) -> None:
        """k, v: [length, kv_heads, dim]."""
        length, self.kv_heads, self.dim = k.shape
        blocks = -(-length // block_size)
        config = tiny(num_layers=1, num_heads=heads, num_kv_heads=self.kv_heads, head_dim=self.dim, rope=None)
        self.pool = PackedPool(config, blocks + 1, block_size, dtype)
        self.pool.memory[:] = OF_NAN
        self.k, self.v, self.heads, self.padded = of_cache(k, dtype), of_cache(v, dtype), heads, self.pool.padded_dim
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)) + 1
        sizes = {"num_heads": heads, "num_kv_heads": self.kv_heads, "head_dim": self.dim, "padded_dim": self.padded}
        blocks_of = {"block_size": block_size, "groups": self.pool.groups, "group_bytes": self.pool.group_bytes}
        memory = {"cache": self.pool.memory.data_ptr(), "scale": 0.3}
        self.attention = library.Attention(**memory, **sizes, **blocks_of, **options)
        self.kernels, self.cache = kernels, kernels.cache[library.INT8 if dtype == torch.int8 else library.BF16]
        for t in range(length):
            block, offset = int(self.table[t // block_size]), t % block_size
            here = k[t].contiguous(), v[t].contiguous()
            self.cache.store(byref(self.attention), block, offset, *(x.data_ptr() for x in here))

    @property
    def slots(self) -> Tensor:
        """Where the sequence lies."""
        positions = torch.arange(len(self.k))
        return self.table[positions // self.pool.block_size] * self.pool.block_size + positions % self.pool.block_size

    def attend(self, q: Tensor, positions: list[int], kv_head: int = 0) -> Tensor:
        """q: [rows, dim] of heads of one kv head -> [rows, dim], splits merged in order."""
        encoded = torch.full((len(q), self.cache.query_bytes(self.padded)), 77, dtype=torch.uint8)
        for row, out in zip(q.float(), encoded, strict=True):
            self.cache.encode_query(row.data_ptr(), self.dim, out.data_ptr(), self.padded)
        queries = (library.Query * len(q))(
            *(library.Query(encoded[i].data_ptr(), position) for i, position in enumerate(positions))
        )
        weighted = torch.full((2, 12, self.padded), 77.0)
        softmaxes = [library.Softmax(weighted=part.data_ptr()) for part in weighted]
        end = positions[-1] + 1
        for begin in range(0, end, 256):
            softmax = softmaxes[begin > 0]
            arguments = (queries, len(q), kv_head, begin, min(begin + 256, end), byref(softmax))
            self.cache.attend(byref(self.attention), self.table.data_ptr(), *arguments)
            if begin:
                self.kernels.merge(byref(softmaxes[0]), byref(softmax), len(q), self.padded)
        out = torch.full((len(q), self.dim), 77.0)
        for row in range(len(q)):
            head = kv_head * (self.heads // self.kv_heads) + row % (self.heads // self.kv_heads)
            self.kernels.finish(byref(self.attention), byref(softmaxes[0]), row, head, out[row].data_ptr())
        return out

    def expected(
        self, q: Tensor, positions: list[int], kv_head: int = 0, seen=lambda p, t: t <= p, cap=0.0, sinks=None
    ) -> Tensor:
        scores = q.float() @ self.k[:, kv_head].t() * 0.3
        scores = cap * torch.tanh(scores / cap) if cap else scores
        mask = torch.tensor([[seen(p, t) for t in range(len(self.k))] for p in positions])
        scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None]], dim=1)
        return scores.softmax(dim=1)[:, : len(self.k)] @ self.v[:, kv_head]


def new_cache(kernels, dtype: torch.dtype, length: int, *, heads=1, kv_heads=1, dim=32, **options: object) -> Cache:
    k, v = random(2, length, kv_heads, dim)
    return Cache(kernels, k, v, dtype, heads=heads, **options)


@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (10, 8), (80, 48), (1, 4)])
def test_keys_and_values_are_kept_as_torch_rounds_them(kernels, dtype_of_cache, dim, block_size):
    k, v = random(2, 50, 2, dim)
    k[3] = 0.0
    v[4, :, 0] = 1e30
    k[5] *= 1e-20
    cache = Cache(kernels, k, v, dtype_of_cache, heads=2, block_size=block_size)
    keys, values = cache.pool.gather(0, cache.slots)
    assert torch.equal(keys.float(), cache.k)
    assert torch.equal(values.float(), cache.v)


@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (10, 16), (80, 32), (128, 8), (16, 4)])
@pytest.mark.parametrize("length", [1, 15, 64, 65, 300, 600])
def test_paged_attention(kernels, dtype_of_cache, dim, block_size, length):
    cache = new_cache(kernels, dtype_of_cache, length, heads=6, kv_heads=2, dim=dim, block_size=block_size)
    positions = [max(length - 4 + i // 3, 0) for i in range(12)]
    q = random(12, dim, seed=5).bfloat16()
    for kv_head in range(2):
        out, expected = cache.attend(q, positions, kv_head), cache.expected(q, positions, kv_head)
        torch.testing.assert_close(out, expected, **CLOSE[dtype_of_cache])


@pytest.mark.parametrize(("window", "sink_tokens"), [(1, 0), (20, 0), (100, 3), (290, 70)])
def test_windows_and_sink_tokens(kernels, dtype_of_cache, window, sink_tokens):
    cache = new_cache(kernels, dtype_of_cache, 400, window=window, sink_tokens=sink_tokens)
    positions = list(range(388, 400))
    q = random(12, 32, seed=5).bfloat16()
    expected = cache.expected(q, positions, seen=lambda p, t: t <= p and (t > p - window or t < sink_tokens))
    torch.testing.assert_close(cache.attend(q, positions), expected, **CLOSE[dtype_of_cache])


def test_soft_capped_scores_and_sink_logits(kernels, dtype_of_cache):
    sinks = torch.tensor([0.5, -30.0, 60.0])
    cache = new_cache(kernels, dtype_of_cache, 70, heads=3, softcap=2.0, sinks=sinks.data_ptr())
    q = random(3, 32, seed=5).bfloat16()
    expected = cache.expected(q, [69] * 3, cap=2.0, sinks=sinks)
    torch.testing.assert_close(cache.attend(q, [69] * 3), expected, **CLOSE[dtype_of_cache])


def test_scores_of_any_size_stay_numbers(kernels, dtype_of_cache):
    cache = new_cache(kernels, dtype_of_cache, 100)
    q = (random(2, 32, seed=5) * torch.tensor([[1e4], [1e-30]])).bfloat16()
    out = cache.attend(q, [99, 99])
    torch.testing.assert_close(out, cache.expected(q, [99, 99]), atol=1e-4, rtol=1e-4)


def test_a_query_of_nan_spoils_itself_and_no_other(kernels, dtype_of_cache):
    cache = new_cache(kernels, dtype_of_cache, 100)
    q = random(5, 32, seed=5).bfloat16()
    clean = cache.attend(q, [99] * 5)
    q[2, 7] = math.nan
    spoiled = cache.attend(q, [99] * 5)
    assert spoiled[2].isnan().all()
    assert torch.equal(spoiled[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_token_of_nan_in_an_int8_cache_spoils_those_that_see_it_and_no_other(kernels, which, bad):
    k, v = random(2, 100, 1, 32)
    q, positions = random(5, 32, seed=5), [95, 96, 97, 98, 99]
    clean = Cache(kernels, k, v, torch.int8, heads=1).attend(q, positions)
    (k if which == "key" else v)[97, 0, 11] = bad
    spoiled = Cache(kernels, k, v, torch.int8, heads=1).attend(q, positions)
    assert torch.equal(spoiled[:2], clean[:2])
    assert spoiled[2:].isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_of_an_int8_cache_do_not_saturate(kernels, sign):
    k, v = torch.ones(64, 1, 256), torch.ones(64, 1, 256)
    k[32:], v[32:] = -1.0, -1.0  # so that the values show what the keys scored
    q = torch.full((1, 256), sign / 200.0)
    cache = Cache(kernels, k, v, torch.int8, heads=1)
    torch.testing.assert_close(cache.attend(q, [63]), cache.expected(q, [63]), atol=1e-4, rtol=1e-3)
    alike = Cache(kernels, k, torch.ones(64, 1, 256), torch.int8, heads=1)
    torch.testing.assert_close(alike.attend(q, [63]), torch.ones(1, 256), atol=4e-3, rtol=0)


def test_a_far_larger_weight_leaves_those_of_other_spans_their_digits(kernels):
    """The digits of a weight are counted from the largest of its own span of 64 keys."""
    k, v = torch.zeros(640, 1, 32), torch.ones(640, 1, 32)
    k[5], v[5] = 1.0, 0.0
    q = torch.full((1, 32), 14.0 / (0.3 * 32))  # key 5 weighs 1.2e6 times as much as any other
    cache = Cache(kernels, k, v, torch.int8, heads=1)
    ratio = cache.attend(q, [639]) / cache.expected(q, [639])
    assert ((ratio > 0.85) & (ratio < 1.01)).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles every kernel with a check at each access
@pytest.mark.skipif(LIBRARY is not None, reason="this is that run")
def test_no_kernel_reads_or_writes_where_it_must_not():
    compiler = build_module.find_compiler()
    sanitizer = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(sanitizer.stdout.strip()).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer here")
    checked = build_module.build(("-fsanitize=address", "-O1"))
    files = [str(Path(__file__).with_name(f"test_native_{name}.py")) for name in ("kernels", "step")]
    environment = os.environ | {
        "ATTENDANT_TEST_LIBRARY": str(checked),
        "LD_PRELOAD": sanitizer.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python's own
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.skipif(LIBRARY is not None, reason="that build has flags of its own")
class TestBuild:
    def test_a_library_of_these_sources_is_compiled_once(self, monkeypatch):
        first = build_module.build()
        monkeypatch.setattr(build_module, "_compile", None)
        assert build_module.build() == first

    def test_one_that_is_there_needs_no_compiler(self, monkeypatch):
        first = build_module.build()
        monkeypatch.setattr(build_module, "COMPILERS", ())
        assert build_module.build() == first

    def test_without_compiler_and_library_the_reason_is_told(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(build_module, "COMPILERS", ())
        monkeypatch.setattr(build_module, "DIRECTORIES", (tmp_path,))
        with pytest.raises(build_module.NoLibrary, match=r"no C\+\+ compiler"):
            build_module.build()
        assert build_module.main() == 0
        assert "torch computes instead" in capsys.readouterr().err

    def test_what_the_compiler_says_is_told(self, monkeypatch, tmp_path):
        monkeypatch.setattr(build_module, "DIRECTORIES", (tmp_path,))
        with pytest.raises(build_module.NoLibrary, match="no-such-flag"):
            build_module.build(("--no-such-flag",))
        assert list(tmp_path.iterdir()) == []


def test_the_structs_of_python_are_those_of_c():
    # Sizes by the rules of the C ABI; a field forgotten on one side would shift all that follow.
    assert ctypes.sizeof(library.Linear) == 64
    assert ctypes.sizeof(library.Attention) == 96
    assert ctypes.sizeof(library.Layer) == 6 * 24 + 4 * 64 + 48 + 96 + 3 * 8 + 16
