"""Every family computes what `transformers` computes: logits of prompts, and 64 greedy tokens however served."""

import pytest
import torch

from model.attention.dense import DenseCausalAttention
from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.cache.pool import KVPool
from tests.parity.conftest import NUM_NEW, TOLERANCE, greedy_request, prompt_of, run, tokens
from tests.parity.models import CASES, FAMILIES

every_case = pytest.mark.parametrize("pair", CASES, indirect=True, scope="module")
LENGTHS = (1, 2, 16, 37, 60)


@every_case
@torch.inference_mode()
def test_logits_of_prompts_of_any_length_equal_those_of_transformers(pair):
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    config = pair.ours.config
    pool = KVPool(config, 64, 4, torch.float32, torch.device("cpu"))
    scattered = torch.randperm(64, generator=torch.Generator().manual_seed(1)).add(1).tolist()
    tables = [[scattered.pop() for _ in range(-(-length // 4))] for length in LENGTHS]
    plan = AttentionPlan.build(4, [0] * len(LENGTHS), list(LENGTHS), tables)
    token_ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    prompt_lens = torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS))
    paged = pair.ours.logits(pair.ours(token_ids, positions, GatheredAttention(plan, pool), prompt_lens))
    for prompt, logits in zip(prompts, paged.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, pair.logits(prompt), atol=TOLERANCE, rtol=0)
    whole = DenseCausalAttention(1, LENGTHS[-1])  # as in training, without a cache
    dense = pair.ours.logits(pair.ours(torch.tensor(prompts[-1]), torch.arange(LENGTHS[-1]), whole))
    torch.testing.assert_close(dense, pair.logits(prompts[-1]), atol=TOLERANCE, rtol=0)


@every_case
def test_greedy_tokens_equal_those_of_transformers_in_a_batch_with_a_shared_prefix(pair):
    first, others = prompt_of(37), [prompt_of(length, seed=length) for length in (1, 18, 50)]
    shares = first[:30] + prompt_of(11, seed=5)
    engine = pair.engine()
    alone = run(engine, [greedy_request("alone", first)])["alone"]
    assert len(set(tokens(alone))) > 5, "a text of one word would hide mistakes"

    prompts = {"first": first, "shares": shares} | {f"other {len(other)}": other for other in others}
    together = run(engine, [greedy_request(name, prompt) for name, prompt in prompts.items()])
    assert tokens(together["first"]) == tokens(alone)
    assert together["first"][0].num_cached_tokens == 36
    assert together["shares"][0].num_cached_tokens == 28
    for name, prompt in prompts.items():
        assert_greedy(pair, prompt, tokens(together[name]))


@pytest.mark.parametrize("pair", FAMILIES, indirect=True, scope="module")
def test_greedy_tokens_equal_those_that_generate_writes(pair):
    prompt = prompt_of(45, seed=2)
    assert tokens(run(pair.engine(), [greedy_request("alone", prompt)])["alone"]) == pair.greedy(prompt)


def assert_greedy(pair, prompt, written):
    """Each token is the likeliest of theirs after all before it: then, one by one, they write the same."""
    assert len(written) == NUM_NEW
    if pair.ours.config.longest_sharing_prompt is not None:  # with dynamic rope the way to a token matters
        assert written == pair.greedy(prompt)
    else:
        assert written == pair.logits([*prompt, *written])[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
