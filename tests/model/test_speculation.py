"""Guessing ahead changes the number of steps and nothing else."""

import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from tests.model.test_engine import prompt, run


def requests(**sampling) -> list[Request]:
    repetitive = [ids * 6 for ids in (prompt(9, seed=1), prompt(5, seed=2), prompt(7, seed=3))]
    return [
        Request(str(i), ids, SamplingParams(max_tokens=60, ignore_eos=True, seed=i, **sampling))
        for i, ids in enumerate([*repetitive, prompt(30, seed=4)])
    ]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.1}], ids=["greedy", "sampled"])
def test_tokens_are_the_same_with_and_without(tiny_llama, sampling):
    def engine(speculative_tokens: int) -> Engine:
        config = EngineConfig(block_size=8, speculative_tokens=speculative_tokens, deterministic=True)
        return Engine.from_checkpoint(tiny_llama[0], config)

    plain = run(engine(0), requests(**sampling))
    speculating = engine(4)
    assert run(speculating, requests(**sampling)) == plain
    assert speculating.stats.num_drafted > 20


def test_right_guesses_save_steps(tiny_llama):
    def steps(speculative_tokens: int) -> int:
        engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(speculative_tokens=speculative_tokens))
        params = SamplingParams(max_tokens=100, temperature=0.0, logit_bias={9: 100.0})  # it says 9 for ever
        return sum(1 for _ in engine.generate(Request("a", prompt(20), params)))

    assert steps(0) == 100
    assert steps(4) == 3 + 1 + 96 // 5 + 1  # three alone, then five a step: four guesses and the token behind them


def test_penalized_requests_are_not_guessed_for(tiny_llama):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(speculative_tokens=4))
    run(engine, requests(temperature=0.0, frequency_penalty=0.01))
    assert engine.stats.num_drafted == 0
