"""What several rooms of tests share: tiny random checkpoints, written by `transformers` itself."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run in its interpreter, correct and slow. To be said before anyone imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# The models here are so small that a second thread waits longer than it works, above all beside other processes.
torch.set_num_threads(1)

pytest_plugins = ["tests.service.served"]

STORYTELLER = Path(__file__).parent.parent / "model" / "checkpoints" / "storyteller"


def write_llama(directory: Path, *, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Save a random Llama in `directory` and return it. Weights are large enough that greedy choices are clear-cut."""
    shape: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.12,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny Llama with grouped-query heads: its directory, and the model as `transformers` runs it."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    return directory, write_llama(directory)


@pytest.fixture(scope="session")
def storyteller() -> Path:
    """The embedded checkpoint."""
    return STORYTELLER
