"""R8: a cache for a quarter of what is asked. Requests take turns, and each says what it would have said alone."""

import random
from pathlib import Path

import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from tests.conftest import STORYTELLER
from tests.faults.conftest import FULL, scaled

pytestmark = [pytest.mark.slow, pytest.mark.faults]

REQUESTS = 64
BLOCK = 8
LENGTHS = {"prompt": (4, scaled(24, 120)), "output": (40, scaled(80, 160))}


def requests(vocab_size: int) -> list[Request]:
    """Half of them greedy, half seeded; every fourth shares its first tokens with others."""
    rng = random.Random(8)
    shared = [rng.randrange(4, vocab_size) for _ in range(16)]
    made = []
    for number in range(REQUESTS):
        prompt = [rng.randrange(4, vocab_size) for _ in range(rng.randint(*LENGTHS["prompt"]))]
        params = SamplingParams(
            max_tokens=rng.randint(*LENGTHS["output"]), temperature=number % 2, seed=number, ignore_eos=True
        )
        made.append(Request(str(number), shared + prompt if number % 4 == 0 else prompt, params))
    return made


def run(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    """Everything at once; a step without end would be a livelock."""
    said: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.add(request)
    steps = 0
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += output.token_ids
        engine.check_integrity()
        steps += 1
        assert steps < 40 * REQUESTS * LENGTHS["output"][1], "they take turns without end"
    return said


def test_requests_that_are_preempted_say_what_they_would_have_said(tiny_model: Path) -> None:
    """Without recomputing what preemption threw away they would go on from wrong keys; where the one that goes first
    could be preempted by the one that waits, both would start anew for ever.
    """
    directory = STORYTELLER if FULL else tiny_model
    options = {"block_size": BLOCK, "deterministic": True, "dtype": "fp32", "max_num_seqs": REQUESTS}
    roomy = Engine.from_checkpoint(directory, EngineConfig(**options, kv_cache_tokens=64 * 1024))
    wanted = requests(roomy.model_config.vocab_size)
    demand = sum(request.num_prompt_tokens + request.params.max_tokens for request in wanted)
    undisturbed = run(roomy, wanted)
    assert roomy.stats.num_preemptions == 0

    tight = Engine.from_checkpoint(directory, EngineConfig(**options, kv_cache_tokens=demand // 4 // BLOCK * BLOCK))
    assert run(tight, requests(tight.model_config.vocab_size)) == undisturbed
    print(f"{tight.stats.num_preemptions} preemptions")
    assert tight.stats.num_preemptions >= 50
    assert tight.scheduler.blocks.num_free == tight.scheduler.blocks.num_blocks, "no block is lost"
