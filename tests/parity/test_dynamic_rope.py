"""Dynamic rope beyond the original length: a key depends on how long its prompt was, and so does who may share it."""

from dataclasses import replace

import pytest

from tests.parity.conftest import NUM_NEW, SMALL, Pair, greedy_request, pair_of, prompt_of, run, tokens

ORIGINAL_LENGTH = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return pair_of("llama, dynamic rope", tmp_path_factory.mktemp("dynamic"))


@pytest.mark.parametrize("length", [20, 64, 65, 170])
def test_prompts_and_completions_across_the_original_length_equal_those_of_transformers(pair, length):
    prompt = prompt_of(length, seed=length)
    assert tokens(run(pair.engine(), [greedy_request("alone", prompt)])["alone"]) == pair.greedy(prompt)


def test_prompts_of_different_lengths_beyond_it_share_no_prefix_and_those_within_it_do(pair):
    long, short = prompt_of(120), prompt_of(50, seed=1)
    prompts = {
        "long": long,
        "long again": long,
        "longer": [*long, 5, 6, 7, 8],
        "begins as long": long[:60],
        "short": short,
        "shorter": short[:45],
        "short and its completion": short + pair.greedy(short)[:8],
    }
    cached = {}
    engine = pair.engine()
    for name, prompt in prompts.items():
        outputs = run(engine, [greedy_request(name, prompt)])[name]
        cached[name] = outputs[0].num_cached_tokens
        assert tokens(outputs) == pair.greedy(prompt), name
    assert cached == {
        "long": 0, "long again": 116, "longer": 0, "begins as long": 0, "short": 0, "shorter": 44,
        "short and its completion": 56,
    }  # fmt: skip


def test_siblings_of_a_long_prompt_share_it(pair):
    prompt = prompt_of(90)
    leader = greedy_request("leader", prompt)
    sibling = greedy_request("sibling", prompt, leader=leader)
    outputs = run(pair.engine(), [leader, sibling])
    assert outputs["sibling"][0].num_cached_tokens == 88
    assert tokens(outputs["leader"]) == tokens(outputs["sibling"]) == pair.greedy(prompt)


def test_a_preempted_request_of_a_long_prompt_resumes_as_if_nothing_had_been(pair):
    prompts = {str(length): prompt_of(length, seed=length) for length in (60, 90, 100)}
    total = sum(len(prompt) for prompt in prompts.values())
    engine = pair.engine(replace(SMALL, kv_cache_tokens=total + NUM_NEW))
    outputs = run(engine, [greedy_request(name, prompt) for name, prompt in prompts.items()])
    assert engine.stats.num_preemptions > 0
    for name, prompt in prompts.items():
        assert tokens(outputs[name]) == pair.greedy(prompt)


def test_a_request_that_moved_here_in_the_middle_goes_on_as_it_would_have_there(pair):
    prompt = prompt_of(70)
    expected = pair.greedy(prompt)
    moved = greedy_request("moved", prompt, output_ids=expected[:20])
    assert tokens(run(pair.engine(), [moved])["moved"]) == expected[20:]
