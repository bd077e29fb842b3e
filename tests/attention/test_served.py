"""Every kind of attention through the whole engine: what a request says is what the equations say, in any company."""

import random

import pytest
import torch

from model.checkpoint import save_checkpoint
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from tests.attention.oracle import config, naive_decoder, randomize
from tests.invariants.test_determinism import logprobs
from tests.model.test_engine import run

KINDS = {
    "scaled dot product": {},
    "multiplicative": {"attention": "multiplicative", "attention_scale": 0.4},
    "additive": {"attention": "additive"},
    "window": {"sliding_window": 9, "full_attention_layers": (1,)},
    "window and sink tokens": {"sliding_window": 9, "num_sink_tokens": 2, "full_attention_layers": (0,)},
    "learned sinks, soft cap": {"sink_logits": True, "attention_soft_cap": 2.0},
    "multiplicative, biases, window, sink tokens, learned sinks": {
        "attention": "multiplicative", "attention_scale": 0.4, "qkv_bias": True, "sliding_window": 11,
        "num_sink_tokens": 1, "sink_logits": True,
    },
    "additive, biases, soft cap, window, sink tokens, learned sinks": {
        "attention": "additive", "attention_soft_cap": 3.0, "qkv_bias": True, "sliding_window": 11,
        "num_sink_tokens": 3, "sink_logits": True,
    },
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request, tmp_path_factory):
    """A random decoder of one kind, and the directory it was saved to."""
    directory = tmp_path_factory.mktemp("kind")
    decoder = Decoder(config(**request.param)).requires_grad_(False)
    randomize(decoder, torch.Generator().manual_seed(0), std=0.2)
    save_checkpoint(decoder, directory, torch.float32)
    return decoder, directory


def engine(directory, **options) -> Engine:
    return Engine.from_checkpoint(directory, EngineConfig(**({"block_size": 4} | options)))


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(96), k=length)


def requests() -> list[Request]:
    return [Request(str(n), prompt(n, seed=n), GREEDY) for n in (1, 4, 9, 17, 26, 40)]


def alone(directory, made: list[Request]) -> dict[str, list[int]]:
    said = {}
    for request in made:
        said |= run(engine(directory), [request])
    return said


def test_greedy_tokens_are_those_of_the_equations(model):
    decoder, directory = model
    ids = prompt(24)
    said = run(engine(directory, max_num_seqs=4, max_num_batched_tokens=7), [Request("a", ids, GREEDY)])["a"]
    logits, _ = naive_decoder(decoder, [*ids, *said])
    assert said == logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
    assert len(set(said)) > 3  # a decoder that always says the same would tell nothing


def test_log_probabilities_of_a_prompt_are_those_of_the_equations(model):
    decoder, directory = model
    ids = prompt(30, seed=1)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    scoring = engine(directory, max_num_seqs=4, max_num_batched_tokens=8)
    (output,) = scoring.generate(Request("a", ids, params))
    found = torch.tensor([item.logprob for item in output.prompt_logprobs[1:]], dtype=torch.float64)
    expected = naive_decoder(decoder, ids)[0].log_softmax(dim=-1)[torch.arange(29), ids[1:]]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_a_mixed_batch_says_what_each_says_alone(model):
    _, directory = model
    batched = run(engine(directory, max_num_batched_tokens=11, max_num_seqs=8), requests(), stagger=2)
    assert batched == alone(directory, requests())


def test_a_prefix_hit_says_what_a_cold_cache_says(model):
    _, directory = model
    serving = engine(directory)
    shared = prompt(28)
    first = run(serving, [Request("a", [*shared, 5], GREEDY)])["a"]
    again = list(serving.generate(Request("b", [*shared, 5], GREEDY)))
    assert again[0].num_cached_tokens == 28
    assert [token_id for output in again for token_id in output.token_ids] == first
    other = run(serving, [Request("c", [*shared, 6, 7], GREEDY)])["c"]
    assert other == run(engine(directory, prefix_cache=False), [Request("c", [*shared, 6, 7], GREEDY)])["c"]


def test_a_preempted_request_says_what_it_says_undisturbed(model):
    _, directory = model
    tight = engine(directory, kv_cache_tokens=72, max_num_batched_tokens=16, max_num_seqs=8)
    assert run(tight, requests()) == alone(directory, requests())
    assert tight.stats.num_preemptions > 2


def test_guessing_ahead_says_the_same(model):
    _, directory = model
    # Of three words only, so that there is something to guess from, and drawn, so that some guesses are wrong.
    words = dict.fromkeys((5, 6, 7), 100.0)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, logit_bias=words)
    plain = run(engine(directory), [Request("a", prompt(9), params)])
    guessing = engine(directory, speculative_tokens=3)
    assert run(guessing, [Request("a", prompt(9), params)]) == plain
    assert guessing.stats.num_drafted > guessing.stats.num_accepted > 0


def test_deterministic_mode_gives_the_same_bits_in_any_company(model):
    _, directory = model
    params = SamplingParams(max_tokens=12, temperature=0.7, seed=1, ignore_eos=True, logprobs=0)

    def made() -> list[Request]:
        return [Request(str(n), prompt(n, seed=n % 3), params) for n in (1, 6, 15, 33, 50, 70)]

    lone = {}
    for request in made():
        lone |= logprobs(engine(directory, deterministic=True, prefix_cache=False), [request])
    tight = engine(directory, deterministic=True, kv_cache_tokens=120, max_num_batched_tokens=21, max_num_seqs=8)
    assert logprobs(tight, made()) == lone
    assert tight.stats.num_preemptions > 0


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_other_dtypes_serve_every_kind(model, dtype):
    _, directory = model
    made = lambda: [Request(str(n), prompt(n, seed=n), GREEDY) for n in (9, 17, 26)]  # noqa: E731
    options = {"dtype": dtype, "deterministic": True}
    lone = {}
    for request in made():
        lone |= run(engine(directory, **options), [request])
    assert run(engine(directory, **options), made()) == lone
