"""The fused forward pass against torch's, through the engine: chunks, decodes, mixed steps, shared prefixes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.attention.weights import AttentionRequest
from model.checkpoint import load_checkpoint
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import ConfigError
from model.kernels.gpu.linear import FEW_ROWS, DenseLinear, WeightInt8Linear
from model.kernels.int8 import int8_linear_torch
from model.layers import Int8Linear, Linear, replace_linears
from model.sampling.params import SamplingParams
from tests.parity.models import write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One of each trait that the fused pass treats in its own way, in two layers: the interpreter takes its time for each.
CASES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2, window on upper layers": {"max_window_layers": 1},
    "qwen3": {},
    "gemma3": {"sliding_window_pattern": 2},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mixtral": {},
    "llama, biases": {},
}


def run(directory: Path, kernels: str) -> list[list[int]]:
    """Three requests that prefill in chunks beside decodes, two of them behind one prefix."""
    config = EngineConfig(
        dtype="fp32", device=DEVICE, block_size=8, kv_cache_tokens=512, max_num_seqs=4, max_num_batched_tokens=16,
        kernels=kernels,
    )  # fmt: skip
    engine = Engine.from_checkpoint(directory, config)
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 300, (20,), generator=generator).tolist()
    outputs: dict[str, list[int]] = {}
    for name, prompt in (("a", [*shared, 7, 9]), ("b", [5, 6, 7]), ("c", [*shared, 11])):
        engine.add(Request(name, prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)))
        outputs[name] = []
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    return list(outputs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_fused_pass_says_what_torch_says(tmp_path, name):
    write(name, tmp_path, num_hidden_layers=2, **CASES[name])
    assert run(tmp_path, "triton") == run(tmp_path, "torch")


@pytest.mark.slow
def test_weights_that_are_asked_for_are_those_of_transformers(tmp_path):
    theirs = write("gemma3", tmp_path, num_hidden_layers=2, sliding_window_pattern=2)
    config = EngineConfig(
        dtype="fp32", device=DEVICE, block_size=8, kv_cache_tokens=512, max_num_seqs=4, max_num_batched_tokens=16,
        kernels="triton",
    )  # fmt: skip
    ids = list(range(40, 64))  # more than a window
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    asked = AttentionRequest(layers=(1, 0), heads=(3, 0))
    outputs = list(Engine.from_checkpoint(tmp_path, config).generate(Request("a", ids, params, attention=asked)))
    written = [output.token_ids[0] for output in outputs]
    with torch.no_grad():
        expected = theirs(torch.tensor([[*ids, *written]]), output_attentions=True).attentions
    for row, output in enumerate(outputs, len(ids) - 1):
        for layer, head, positions, weights in output.attention[0]:
            assert positions == list(range(row + 1))
            theirs_there = expected[layer][0, head, row, : row + 1]
            torch.testing.assert_close(torch.tensor(weights), theirs_there, atol=1e-4, rtol=0)


def test_a_model_that_cannot_be_fused_is_named(tmp_path):
    write("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="'triton' cannot run this model here: its norm is 'layer'"):
        run(tmp_path, "triton")


def test_an_fp8_cache_is_for_tritons_kernels(tmp_path):
    write("llama", tmp_path)
    with pytest.raises(ConfigError, match="'fp8' is for Triton's kernels"):
        Engine.from_checkpoint(tmp_path, EngineConfig(device=DEVICE, kernels="torch", kv_cache_dtype="fp8"))


def test_an_fp8_cache_holds_twice_the_tokens_of_a_half_precision_one(tmp_path):
    write("llama", tmp_path, num_hidden_layers=1)
    config = EngineConfig(device=DEVICE, dtype="fp32", kernels="triton", kv_cache_dtype="fp8", kv_cache_tokens=64)
    engine = Engine.from_checkpoint(tmp_path, config)
    model, keys = engine.model_config, engine.runner.compute.pool.keys
    assert (
        keys.nbytes == 80 * model.num_layers * model.num_kv_heads * model.head_dim
    )  # a byte each, null block included
    outputs = list(engine.generate(Request("a", list(range(40, 60)), SamplingParams(max_tokens=3, temperature=0.0))))
    assert len(outputs) == 3
    assert keys.float().isfinite().all()
    assert keys[0, 16:36].float().any(dim=-1).all()


def test_int8_weights_say_what_the_same_weights_say_when_they_are_widened(tmp_path):
    write("qwen2", tmp_path, num_hidden_layers=2)
    config = EngineConfig(device=DEVICE, dtype="int8", kernels="triton", kv_cache_tokens=64)
    widened = load_checkpoint(tmp_path, device=DEVICE, int8=True)
    replace_linears(widened, widen, Int8Linear)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    engines = Engine.from_checkpoint(tmp_path, config), Engine(widened, replace(config, dtype="fp32", kernels="torch"))
    found, expected = (
        [output.token_ids for output in engine.generate(Request("a", list(range(40, 52)), params))]
        for engine in engines
    )
    assert found == expected


def widen(linear: Int8Linear) -> Linear:
    out_features, in_features = linear.weight.shape
    wide = Linear(in_features, out_features, bias=linear.bias is not None).to(linear.scale.device).requires_grad_(False)
    wide.weight.copy_(linear.weight.float() * linear.scale[:, None])
    if linear.bias is not None:
        wide.bias.copy_(linear.bias)
    return wide


def test_int8_weights_are_right_for_many_rows_for_a_few_and_for_one():
    generator = torch.Generator().manual_seed(0)
    linear = Linear(24, 40, bias=True).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    linear.bias.normal_(generator=generator)
    quantized = Int8Linear(linear)
    x = torch.randn(FEW_ROWS + 1, 24, generator=generator)
    expected = int8_linear_torch(x, quantized.weight, quantized.scale, quantized.bias)
    product = WeightInt8Linear(quantized).to(DEVICE)
    for rows in (FEW_ROWS + 1, 3, 1):
        found = product(x[:rows].to(DEVICE)).cpu()
        torch.testing.assert_close(found, expected[:rows], atol=1e-4, rtol=1e-4)


def test_int8_weights_of_many_rows_keep_their_scales_in_full():
    """What is rounded to bf16 is each result, up or down by chance; a rounded scale would tilt a whole channel."""
    generator = torch.Generator().manual_seed(0)
    linear = Linear(24, 40, bias=False).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    quantized = Int8Linear(linear)
    x = torch.randn(4 * FEW_ROWS, 24, generator=generator).bfloat16()
    expected = int8_linear_torch(x.float(), quantized.weight, quantized.scale)
    found = WeightInt8Linear(quantized).to(DEVICE)(x.to(DEVICE)).cpu().float()
    tilt = (found * expected).sum(dim=0) / expected.square().sum(dim=0) - 1
    assert tilt.abs().max() < 1.5e-3


def test_dense_weights_are_right_for_many_rows_and_for_one():
    generator = torch.Generator().manual_seed(0)
    linear = Linear(24, 40, bias=True).requires_grad_(False).to(DEVICE)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
    linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator))
    x = torch.randn(3, 24, generator=generator).to(DEVICE)
    product = DenseLinear(linear)
    for rows in (3, 1):
        torch.testing.assert_close(product(x[:rows]), x[:rows] @ linear.weight.t() + linear.bias, atol=1e-4, rtol=1e-4)
