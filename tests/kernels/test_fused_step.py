"""The fused forward pass against torch's, through the engine: chunks, decodes, mixed steps, shared prefixes."""

from pathlib import Path

import pytest
import torch

from model.attention.weights import AttentionRequest
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import ConfigError
from model.sampling.params import SamplingParams
from tests.parity.models import write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One of each trait that the fused pass treats in its own way.
NAMES = ["llama", "qwen2, window on upper layers", "qwen3", "gemma3", "phi3", "smollm3", "mixtral", "llama, biases"]


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
        engine.add(Request(name, prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)))
        outputs[name] = []
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    return list(outputs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_fused_pass_says_what_torch_says(tmp_path, name):
    write(name, tmp_path, num_hidden_layers=3)
    assert run(tmp_path, "triton") == run(tmp_path, "torch")


@pytest.mark.slow
def test_weights_that_are_asked_for_are_those_of_transformers(tmp_path):
    theirs = write("gemma3", tmp_path, num_hidden_layers=3)
    config = EngineConfig(
        dtype="fp32", device=DEVICE, block_size=8, kv_cache_tokens=512, max_num_seqs=4, max_num_batched_tokens=16,
        kernels="triton",
    )  # fmt: skip
    ids = list(range(40, 70))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    asked = AttentionRequest(layers=(2, 0), heads=(3, 0))
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
