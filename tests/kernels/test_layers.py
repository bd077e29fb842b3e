"""Each Triton kernel of a decoder layer against its twin in plain torch, on sizes that fill no tile."""

import pytest
import torch
from torch import Tensor

from model.cache.pool import FP8
from model.kernels.activation import Activation, gated, gated_torch
from model.kernels.int8 import MAX_ROWS, int8_linear, int8_linear_torch
from model.kernels.norm import add_rms_norm, add_rms_norm_torch
from model.kernels.one_row import one_row_linear, one_row_linear_torch
from model.kernels.rope import rope_and_store, rope_and_store_torch

pytestmark = pytest.mark.fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is silently wrong in the interpreter; on a GPU it is the dtype that counts.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def draw(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE[found.dtype], rtol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("size", [1, 48, 576])
def test_norm_of_the_residual_stream(draw, size):
    x, residual, weight = draw(5, size), draw(5, size), draw(size)
    expected_stream = residual.clone()
    expected = add_rms_norm_torch(x, expected_stream, weight, 1e-5)
    assert_equal(add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_stream)


def test_norm_alone_leaves_the_stream_as_it_was(draw):
    residual, weight = draw(3, 40), draw(40)
    before = residual.clone()
    assert_equal(add_rms_norm(None, residual, weight, 1e-5), add_rms_norm_torch(None, before.clone(), weight, 1e-5))
    assert torch.equal(residual, before)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 77, 1500])
def test_gated_activation(draw, kind: Activation, size):
    wide = draw(3, 2 * size) * 3
    assert_equal(gated(wide, kind), gated_torch(wide, kind))


@pytest.mark.parametrize("rotary", [0, 8, 24])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_store(draw, dtype, rotary, normed):
    heads, kv_heads, dim, tokens = 6, 2, 24, 5
    qkv = draw(tokens, (heads + 2 * kv_heads) * dim)
    slots = torch.tensor([9, 3, 17, 16, 4], device=DEVICE)
    rope = (draw(tokens, 1, rotary), draw(tokens, 1, rotary)) if rotary else None
    norms = (draw(dim), draw(dim)) if normed else None
    caches = [torch.full((20, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(4)]
    q = rope_and_store(qkv, heads, caches[0], caches[1], slots, rope, norms, 1e-6)
    expected = rope_and_store_torch(qkv, heads, caches[2], caches[3], slots, rope, norms, 1e-6)
    assert_equal(q, expected)
    assert_equal(caches[0][slots], caches[2][slots])
    assert torch.equal(caches[1][slots], caches[3][slots])
    untouched = [slot for slot in range(20) if slot not in slots.tolist()]
    assert caches[0][untouched].isnan().all()
    assert caches[1][untouched].isnan().all()


def test_rows_that_only_pad_the_batch_are_stored_nowhere():
    qkv = torch.ones(3, 4 * 16, device=DEVICE)
    keys, values = (torch.zeros(5, 1, 16, device=DEVICE) for _ in range(2))
    rope_and_store(qkv, 2, keys[1:], values[1:], torch.tensor([2, -1, -1], device=DEVICE), None, None, 1e-6)
    for cache in (keys, values):  # what slot -1 would be lies before the first
        assert cache.flatten(1).any(dim=1).tolist() == [False, False, False, True, False]


def test_a_cache_in_fp8_takes_what_it_can_reach():
    qkv = torch.zeros(1, 4 * 16, device=DEVICE)
    qkv[0, 32:] = torch.linspace(-1000, 1000, 32)
    keys, values = (torch.zeros(2, 1, 16, device=DEVICE).to(FP8) for _ in range(2))
    rope_and_store(qkv, 2, keys, values, torch.tensor([1], device=DEVICE), None, None, 1e-6)
    stored = torch.cat([keys[1], values[1]], dim=1)[0].float()
    assert torch.equal(stored, qkv[0, 32:].clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize(
    ("rows", "depth", "channels"), [(1, 64, 64), (3, 77, 130), (MAX_ROWS, 200, 65), (2 * MAX_ROWS + 3, 40, 20)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_int8_weights(draw, rows, depth, channels, biased):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (channels, depth), generator=generator).to(DEVICE, torch.int8)
    scale = torch.rand(channels, generator=generator).to(DEVICE) / depth / 10
    x, bias = draw(rows, depth), draw(channels) if biased else None
    assert_equal(int8_linear(x, weight, scale, bias), int8_linear_torch(x, weight, scale, bias))


@pytest.mark.parametrize(("depth", "channels"), [(64, 64), (77, 130), (1, 3), (2100, 5), (4097, 2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weights", ["dense", "int8"])
def test_one_row_by_itself(draw, depth, channels, biased, weights):
    generator = torch.Generator().manual_seed(1)
    x, bias, scale = draw(1, depth), draw(channels) if biased else None, None
    weight = draw(channels, depth)
    if weights == "int8":
        weight = torch.randint(-127, 128, (channels, depth), generator=generator).to(DEVICE, torch.int8)
        scale = torch.rand(channels, generator=generator).to(DEVICE) / depth / 10
    assert_equal(one_row_linear(x, weight, scale, bias), one_row_linear_torch(x, weight, scale, bias))
