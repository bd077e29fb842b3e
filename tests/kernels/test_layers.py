"""Each Triton kernel of a decoder layer against its twin in plain torch, on sizes that fill no tile."""

import pytest
import torch
from torch import Tensor

from model.kernels.activation import Activation, gated, gated_torch
from model.kernels.int8 import MAX_ROWS, int8_linear, int8_linear_torch
from model.kernels.norm import add_rms_norm, add_rms_norm_torch
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


@pytest.mark.parametrize(("rows", "depth", "channels"), [(1, 64, 64), (3, 77, 130), (MAX_ROWS, 200, 65)])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_weights(draw, rows, depth, channels, biased):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (channels, depth), generator=generator).to(DEVICE, torch.int8)
    scale = torch.rand(channels, generator=generator).to(DEVICE) / depth / 10
    x, bias = draw(rows, depth), draw(channels) if biased else None
    assert_equal(int8_linear(x, weight, scale, bias), int8_linear_torch(x, weight, scale, bias))


def test_int8_weights_refuse_more_rows_than_they_are_good_for(draw):
    weight, scale = torch.zeros(8, 16, dtype=torch.int8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(AssertionError, match="65 rows"):
        int8_linear(draw(65, 16), weight, scale)
