"""With `deterministic=True` not a bit of a request depends on its company."""

import random

import pytest
import torch

from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from tests.model.test_engine import run


def random_requests(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    prefixes = [rng.choices(range(3, 320), k=40) for _ in range(4)]
    made = []
    for i in range(count):
        ids = [*rng.choice(prefixes)[: rng.randrange(41)], *rng.choices(range(3, 320), k=rng.randrange(1, 30))]
        params = SamplingParams(
            max_tokens=rng.randrange(4, 20),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            ignore_eos=True,
            logprobs=0,
        )
        made.append(Request(str(i), ids, params))
    return made


def new_engine(directory, **config) -> Engine:
    settings = {"block_size": 8, "deterministic": True, "max_num_seqs": 32} | config
    return Engine.from_checkpoint(directory, EngineConfig(**settings))


def logprobs(engine: Engine, requests: list[Request]) -> dict[str, list[tuple[int, float]]]:
    """Every token with its log-probability: the bits themselves, not only what was chosen by them."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[tuple[int, float]]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += [
                (t, item.logprob) for t, item in zip(output.token_ids, output.logprobs, strict=True)
            ]
    return found


@pytest.mark.slow
def test_200_requests_give_the_same_bits_alone_batched_chunked_preempted_and_cached(tiny_llama):
    directory = tiny_llama[0]
    lone = new_engine(directory, prefix_cache=False)
    alone = {}
    for request in random_requests(200, seed=0):
        alone |= logprobs(lone, [request])
    order = random_requests(200, seed=0)
    batched, preempted = {}, 0
    rng = random.Random(1)
    while order:
        batch, order = order[: (size := rng.randrange(2, 33))], order[size:]
        engine = new_engine(
            directory,
            max_num_batched_tokens=rng.choice([32, 50, 128]),
            kv_cache_tokens=rng.choice([128, 256, 4096]),
            prefix_cache=rng.random() < 0.7,
        )
        batched |= logprobs(engine, batch)
        preempted += engine.stats.num_preemptions
    assert batched == alone
    assert preempted > 20


def test_resuming_elsewhere_gives_the_same_bits(tiny_llama):
    (whole,) = logprobs(new_engine(tiny_llama[0]), random_requests(1, seed=3)).values()
    (request,) = random_requests(1, seed=3)
    ids = request.token_ids
    for emitted in range(1, len(whole)):
        resumed = Request("0", ids, request.params, output_ids=[token_id for token_id, _ in whole[:emitted]])
        assert logprobs(new_engine(tiny_llama[0]), [resumed])["0"] == whole[emitted:]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_dtypes_are_as_deterministic(tiny_llama, dtype):
    make = lambda: random_requests(12, seed=5)  # noqa: E731
    alone = {}
    for request in make():
        alone |= logprobs(new_engine(tiny_llama[0], dtype=dtype), [request])
    assert logprobs(new_engine(tiny_llama[0], dtype=dtype), make()) == alone


@pytest.mark.parametrize(("dtype", "cache"), [("bf16", "auto"), ("int8", "auto"), ("int8", "int8")])
def test_native_kernels_are_as_deterministic_without_being_asked(tiny_llama, dtype, cache):
    rng = random.Random(2)
    options = {"dtype": dtype, "kernels": "native", "deterministic": False, "kv_cache_dtype": cache}
    lone, alone = new_engine(tiny_llama[0], prefix_cache=False, num_threads=1, **options), {}
    for request in random_requests(40, seed=6):
        alone |= logprobs(lone, [request])
    together, preempted = {}, 0
    order = random_requests(40, seed=6)
    while order:
        batch, order = order[: (size := rng.randrange(4, 20))], order[size:]
        tokens = {"max_num_batched_tokens": rng.choice([32, 50, 128]), "kv_cache_tokens": rng.choice([128, 256])}
        engine = new_engine(tiny_llama[0], num_threads=2, **tokens, **options)
        together |= logprobs(engine, batch)
        preempted += engine.stats.num_preemptions
    assert together == alone
    assert preempted > 5


def test_deterministic_attention_agrees_with_the_oracle(tiny_llama):
    plain = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    ids = torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = run(plain, [Request("a", ids, params)])
    assert run(new_engine(tiny_llama[0]), [Request("a", ids, params)]) == expected


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_gives_a_row_the_same_bits_in_any_company(activation, gated):
    config = ModelConfig(
        vocab_size=8, hidden_size=20, intermediate_size=77, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=20,
        max_position_embeddings=8, activation=activation, gated_mlp=gated,
    )  # fmt: skip
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0), std=1.0)
    decoder.fix_row_tiles()
    x = torch.randn(21, 20, generator=torch.Generator().manual_seed(1))
    mlp = decoder.layers[0].mlp
    with torch.no_grad():
        together = mlp(x)
        for row in range(21):
            assert torch.equal(mlp(x[row : row + 1])[0], together[row])
