"""One model of `transformers` and ours, loaded from the directory that it wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model.checkpoint import load_checkpoint
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request, TokenOutput
from model.sampling.params import SamplingParams
from tests.parity.models import write

TOLERANCE = 2e-4
NUM_NEW = 64  # greedy tokens to agree on
# Blocks of 4 tokens and chunks of 24, so that every prompt is divided over both.
SMALL = EngineConfig(block_size=4, kv_cache_tokens=2048, max_num_seqs=8, max_num_batched_tokens=24, num_threads=1)


@dataclass
class Pair:
    """The same model twice: as `transformers` runs it, and as we have read it from its directory."""

    directory: Path
    theirs: PreTrainedModel
    ours: Decoder

    def engine(self, config: EngineConfig = SMALL) -> Engine:
        return Engine(self.ours, config)

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Theirs for each token of a prompt, [num_tokens, vocab_size]."""
        self._forget()
        return self.theirs(torch.tensor([token_ids])).logits[0]

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int = NUM_NEW) -> list[int]:
        """What their `generate` writes, end-of-sequence or not."""
        self._forget()
        ids = torch.tensor([prompt])
        out = self.theirs.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        return out[0, len(prompt) :].tolist()

    def _forget(self) -> None:
        """Dynamic rope keeps the longest length it has seen; one token brings it back to the original one."""
        self.theirs(torch.tensor([[1]]))


def pair_of(case: str, directory: Path, **changes: object) -> Pair:
    theirs = write(case, directory, **changes)
    return Pair(directory, theirs, load_checkpoint(directory))


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The case that the test is parametrized with."""
    return pair_of(request.param, tmp_path_factory.mktemp("pair"))


def prompt_of(length: int, seed: int = 0, vocab_size: int = 257) -> list[int]:
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy_request(name: str, prompt: list[int], **options: Any) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True), **options)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    """Run requests together until all have ended."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.check_integrity()
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
