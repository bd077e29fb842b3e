"""Loading takes one copy of the weights and little more, in every dtype. How long it took is printed, not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

MIB = 2**20
LOAD = """
import sys, time
from pathlib import Path
from model.config import EngineConfig
from model.engine.engine import Engine
began = time.perf_counter()
engine = Engine.from_checkpoint(Path(sys.argv[1]), EngineConfig(dtype=sys.argv[2], device="cpu", max_num_seqs=1))
seconds = time.perf_counter() - began
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
print(int(peak) // 1024, seconds)
"""


def write_large(directory: Path, dtype: torch.dtype) -> int:
    """A Llama of 138 million weights, 0.55 GB in fp32. Returns the bytes of its file."""
    hidden, wide, layers, vocab = 768, 3072, 12, 32_000
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj": (wide, hidden) for part in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, wide)}
        shapes |= {f"{layer}.{norm}_layernorm": (hidden,) for norm in ("input", "post_attention")}
    weights = {f"{name}.weight": torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": 12, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return (directory / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("large")


@pytest.mark.parametrize(
    ("on_disk", "computed_in", "size_in_memory"),
    [("float32", "fp32", 1), ("float32", "bf16", 0.5), ("float32", "int8", 0.5), ("bfloat16", "bf16", 1),
     ("bfloat16", "fp32", 2), ("bfloat16", "int8", 1)],
)  # fmt: skip
def test_peak_memory_is_that_of_the_weights_and_a_seventh_and_300_mb(large, on_disk, computed_in, size_in_memory):
    directory = large / on_disk
    size = (
        (directory / "model.safetensors").stat().st_size
        if directory.exists()
        else write_large(directory, getattr(torch, on_disk))
    )
    command = [sys.executable, "-c", LOAD, str(directory), computed_in]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = (float(number) for number in done.stdout.split())
    weights = size * size_in_memory / MIB
    print(f"{on_disk} as {computed_in}: peak {peak:.0f} MiB for {weights:.0f} MiB of weights, {seconds:.1f} s")
    assert peak <= weights * 1.15 + 300
