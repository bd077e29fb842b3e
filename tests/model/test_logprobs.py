"""Log-probabilities and searches over completions, against `transformers`."""

import pytest
import torch

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.search import beam_search, best_of
from model.sampling.params import SamplingParams, sibling_seed
from tests.model.test_engine import prompt


def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("budget", [16, 512])
def test_logprobs_of_prompt_and_completion_are_those_of_the_whole_text(tiny_llama, budget):
    directory, model = tiny_llama
    engine = Engine.from_checkpoint(
        directory, EngineConfig(block_size=8, max_num_batched_tokens=budget, max_num_seqs=8)
    )
    ids = prompt(40)
    for _ in range(2):  # the second time the prefix is cached, and must still be scored
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        outputs = list(engine.generate(Request("a", ids, params)))
        tokens = [token_id for output in outputs for token_id in output.token_ids]
        scored = [item for output in outputs for item in output.logprobs]
        expected = logprobs_of(model, ids + tokens)
        assert [s.logprob for s in scored] == pytest.approx(
            [expected[39 + i, t].item() for i, t in enumerate(tokens)], abs=2e-4
        )
        assert [i for i, _ in scored[0].top] == expected[39].topk(3).indices.tolist()
        first, *rest = outputs[0].prompt_logprobs
        assert first is None
        assert [s.logprob for s in rest] == pytest.approx(
            [expected[i - 1, ids[i]].item() for i in range(1, 40)], abs=2e-4
        )
        assert [i for i, _ in rest[9].top] == expected[9].topk(2).indices.tolist()
        assert all(output.prompt_logprobs is None for output in outputs[1:])


def test_prompt_logprobs_survive_preemption(tiny_llama):
    config = EngineConfig(block_size=8, kv_cache_tokens=160, max_num_batched_tokens=16, max_num_seqs=8)
    engine = Engine.from_checkpoint(tiny_llama[0], config)
    for i in range(4):
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        engine.add(Request(str(i), prompt(40, seed=i), params))
    scored = {}
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs:
                assert output.request_id not in scored
                scored[output.request_id] = [item.logprob for item in output.prompt_logprobs[1:]]
    assert engine.stats.num_preemptions > 0
    for i in range(4):
        ids = prompt(40, seed=i)
        expected = logprobs_of(tiny_llama[1], ids)
        assert scored[str(i)] == pytest.approx([expected[j - 1, ids[j]].item() for j in range(1, 40)], abs=2e-4)


def test_best_of_returns_the_likeliest_and_computes_the_prompt_once(tiny_llama):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8, max_num_batched_tokens=64))
    ids, params = prompt(80), SamplingParams(max_tokens=8, temperature=1.5, seed=11, ignore_eos=True)
    best = best_of(engine, ids, params, n=2, count=6)
    alone = []
    for index in range(6):
        own = SamplingParams(max_tokens=8, temperature=1.5, seed=sibling_seed(11, index), ignore_eos=True, logprobs=0)
        plain = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
        outputs = list(plain.generate(Request("a", ids, own)))
        alone.append(
            (sum(o.logprobs[0].logprob for o in outputs) / 8, [t for output in outputs for t in output.token_ids])
        )
    alone.sort(reverse=True)
    assert [completion.token_ids for completion in best] == [tokens for _, tokens in alone[:2]]
    assert engine.stats.prefix_hits == 5 * 72  # five siblings, nine blocks of the ten: the last must give logits


def test_sibling_seeds_differ_and_the_first_is_the_request_s_own():
    seeds = [sibling_seed(-7, index) for index in range(1000)]
    assert seeds[0] == -7
    assert len(set(seeds)) == 1000
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_beam_search_finds_what_transformers_finds(tiny_llama, width):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
    for seed in range(3):
        ids = prompt(12, seed=seed)
        expected = tiny_llama[1].generate(
            torch.tensor([ids]), max_new_tokens=10, do_sample=False, num_beams=width, num_return_sequences=1,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        assert beam_search(engine, ids, width=width, max_tokens=10)[0].token_ids == expected[0, 12:].tolist()
    engine.check_integrity()


def test_beam_search_prefers_a_finished_beam_by_its_mean(tiny_llama, monkeypatch):
    directory, model = tiny_llama
    engine = Engine.from_checkpoint(directory, EngineConfig(block_size=8))
    ids = prompt(12)
    second = logprobs_of(model, ids)[-1].topk(2).indices[1].item()
    monkeypatch.setattr(engine, "model_config", type("Config", (), {"eos_token_ids": (second,), "vocab_size": 320}))
    found = beam_search(engine, ids, width=4, max_tokens=6)
    assert {c.finish_reason for c in found} <= {"stop", "length"}
    ended = [c for c in found if c.token_ids == [second]]
    likeliest = max(c.cumulative_logprob / len(c.token_ids) for c in found)
    assert (ended == [] and likeliest > logprobs_of(model, ids)[-1, second]) or ended[0].finish_reason == "stop"


@pytest.mark.parametrize("width", [1, 2])
def test_beam_search_ends_where_every_candidate_has_ended(tiny_llama, monkeypatch, width):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
    everything = type("Config", (), {"eos_token_ids": tuple(range(320)), "vocab_size": 320})
    monkeypatch.setattr(engine, "model_config", everything)
    found = beam_search(engine, prompt(12), width=width, max_tokens=6)
    assert [(len(beam.token_ids), beam.finish_reason) for beam in found] == [(1, "stop")] * width
