"""The engine: what a request says does not depend on its company, its chunks, preemption or where it resumed."""

import random

import pytest
import torch

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import ConfigError, InvalidRequest
from model.sampling.params import SamplingParams
from tests.conftest import write_llama

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 320), k=length)


def seeded(seed: int, max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, top_p=0.95, top_k=50, seed=seed, ignore_eos=True)


def run(engine: Engine, requests: list[Request], stagger: int = 0) -> dict[str, list[int]]:
    """Drive the engine until all requests have ended; `stagger` steps pass between arrivals."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    arrivals = list(requests)
    step = 0
    while arrivals or engine.has_work:
        if arrivals and (stagger == 0 or step % stagger == 0):
            engine.add(arrivals.pop(0))
            if stagger == 0:
                continue
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
        step += 1
        assert step < 5000, "no progress"
    return tokens


@pytest.fixture
def engine(tiny_llama) -> Engine:
    return Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8))


def small_pool(directory, tokens: int) -> Engine:
    config = EngineConfig(block_size=8, kv_cache_tokens=tokens, max_num_batched_tokens=64, max_num_seqs=16)
    return Engine.from_checkpoint(directory, config)


@pytest.mark.parametrize("length", [1, 8, 9, 100])
def test_greedy_tokens_equal_those_of_transformers(engine, tiny_llama, length):
    ids = prompt(length)
    expected = tiny_llama[1].generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    outputs = list(engine.generate(Request("a", ids, SamplingParams(max_tokens=24, temperature=0.0))))
    tokens = [token_id for output in outputs for token_id in output.token_ids]
    theirs = expected[0, length:].tolist()
    if 2 in tokens:  # the end of sequence: transformers was told to go past it
        assert tokens.index(2) == len(tokens) - 1
        theirs = [*theirs[: len(tokens) - 1], 2]
    assert tokens == theirs


@pytest.mark.parametrize("budget", [16, 33, 512])
def test_a_batch_of_8_gives_each_request_what_it_gets_alone(tiny_llama, budget):
    params = [GREEDY, *(seeded(i) for i in range(7))]
    prompts = [prompt(length, seed=length) for length in (1, 3, 8, 16, 17, 40, 77, 120)]
    make = lambda: [Request(str(i), ids, p) for i, (ids, p) in enumerate(zip(prompts, params, strict=True))]  # noqa: E731
    alone = {}
    for request in make():
        alone |= run(Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8)), [request])
    config = EngineConfig(block_size=8, max_num_batched_tokens=budget, max_num_seqs=16)
    assert run(Engine.from_checkpoint(tiny_llama[0], config), make(), stagger=2) == alone


def test_requests_that_outgrow_the_cache_are_preempted_and_say_the_same(tiny_llama):
    make = lambda: [Request(str(i), prompt(10 + i, seed=i), seeded(i, max_tokens=60)) for i in range(8)]  # noqa: E731
    roomy = run(Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8)), make())
    engine = small_pool(tiny_llama[0], tokens=160)  # the eight need about 600 at their ends
    assert run(engine, make()) == roomy
    assert engine.stats.num_preemptions > 5


def test_a_shared_prefix_is_computed_once(engine):
    shared = prompt(48)
    first = run(engine, [Request("a", [*shared, 5], GREEDY)])
    again = list(engine.generate(Request("b", [*shared, 5], GREEDY)))
    assert again[0].num_cached_tokens == 48
    assert [t for output in again for t in output.token_ids] == first["a"]


def test_a_prompt_that_is_cached_whole_still_computes_its_last_block(engine):
    ids = prompt(48)
    first = run(engine, [Request("a", ids, GREEDY)])
    again = list(engine.generate(Request("b", ids, GREEDY)))
    assert again[0].num_cached_tokens == 40
    assert [t for output in again for t in output.token_ids] == first["a"]


def test_without_a_prefix_cache_nothing_is_shared(tiny_llama):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(block_size=8, prefix_cache=False))
    run(engine, [Request("a", prompt(48), GREEDY)])
    assert next(engine.generate(Request("b", prompt(48), GREEDY))).num_cached_tokens == 0


@pytest.mark.parametrize("emitted", [1, 7, 23])
def test_a_request_resumes_elsewhere_as_if_it_had_never_moved(tiny_llama, emitted):
    ids, params = prompt(20), seeded(3)
    whole = run(Engine.from_checkpoint(tiny_llama[0], EngineConfig()), [Request("a", ids, params)])["a"]
    other = Engine.from_checkpoint(tiny_llama[0], EngineConfig())
    assert run(other, [Request("a", ids, params, output_ids=whole[:emitted])])["a"] == whole[emitted:]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_frees_all_blocks(tiny_llama, steps):
    engine = small_pool(tiny_llama[0], tokens=256)
    for i in range(6):
        engine.add(Request(str(i), prompt(50, seed=i), GREEDY))
    for _ in range(steps):
        engine.step()
    assert all(engine.abort(str(i)) for i in range(6))
    assert not engine.abort("0")
    assert not engine.has_work
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    engine.check_integrity()


def test_an_aborted_request_leaves_its_neighbours_alone(engine):
    alone = run(engine, [Request("b", prompt(9, seed=1), seeded(1))])["b"]
    engine.add(Request("a", prompt(30), GREEDY))
    engine.add(Request("c", prompt(9, seed=1), seeded(1)))
    engine.step()
    assert engine.abort("a")
    tokens = [token_id for _ in range(30) for output in engine.step() for token_id in output.token_ids]
    assert tokens == alone[1:]


def test_warming_up_takes_the_steps_of_a_plain_and_of_a_penalized_request_and_leaves_no_trace(engine, monkeypatch):
    steps, stage = [], engine.runner.stage

    def staged(step, *args):
        steps.append([(item.num_tokens, item.request.params.penalizes) for item in step.requests])
        return stage(step, *args)

    monkeypatch.setattr(engine.runner, "stage", staged)
    engine.warm_up()
    assert steps == [[(2, False)], [(1, False)], [(2, True)], [(1, True)]]
    assert not engine.has_work
    engine.check_integrity()
    outputs = list(engine.generate(Request("warm-up", prompt(5), GREEDY)))
    assert sum(len(output.token_ids) for output in outputs) == 24
    assert engine.stats.prefix_queries == 5


def test_a_completion_ends_at_an_end_of_sequence_token(tmp_path):
    model = write_llama(tmp_path, seed=1)
    ids = prompt(5)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 5:].tolist()
    write_llama(tmp_path, seed=1, eos_token_id=[300, greedy[3]])
    (tmp_path / "generation_config.json").unlink()
    engine = Engine.from_checkpoint(tmp_path, EngineConfig())
    outputs = list(engine.generate(Request("a", ids, SamplingParams(max_tokens=8, temperature=0.0))))
    end = greedy.index(greedy[3]) + 1
    assert [t for output in outputs for t in output.token_ids] == greedy[:end]
    assert outputs[-1].finish_reason == "stop"
    ignoring = list(engine.generate(Request("b", ids, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))))
    assert (len(ignoring), ignoring[-1].finish_reason) == (8, "length")


def test_a_step_that_fails_ends_its_requests_and_spares_the_next(engine, monkeypatch):
    engine.add(Request("a", prompt(5), GREEDY))
    monkeypatch.setattr(engine.runner, "forward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert [(output.request_id, output.finish_reason) for output in engine.fail_step()] == [("a", "error")]
    monkeypatch.undo()
    assert len(run(engine, [Request("b", prompt(5), GREEDY)])["b"]) == 24
    engine.check_integrity()


def test_logits_that_are_no_numbers_end_their_request_and_spare_the_batch(engine, monkeypatch):
    alone = run(engine, [Request("b", prompt(9, seed=1), seeded(1))])["b"]
    for name, ids in (("a", prompt(9)), ("b", prompt(9, seed=1))):
        engine.add(Request(name, ids, seeded(1)))
    tokens = [token_id for o in engine.step() if o.request_id == "b" for token_id in o.token_ids]
    logits = engine.runner.compute.decoder.logits

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        out[0, 7] = torch.nan
        return out

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.compute.decoder, "logits", spoiled)
        outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("a", "error"), ("b", None)]
    tokens += outputs[1].token_ids
    while engine.has_work:
        tokens += engine.step()[0].token_ids
    assert tokens == alone
    engine.check_integrity()


def test_a_deadline_ends_a_request_within_a_step(engine, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("model.engine.engine.time.monotonic", lambda: clock[0])
    engine.add(Request("a", prompt(5), GREEDY, deadline=101.0))
    assert engine.step()[0].finish_reason is None
    clock[0] = 101.5
    outputs = engine.step()
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [("a", [], "deadline")]
    assert engine.stats.num_running == 0
    assert engine.stats.kv_cache_usage == 0.0


def test_64_requests_on_a_quarter_of_their_memory_say_what_they_say_with_room(tiny_llama):
    make = lambda: [  # noqa: E731
        Request(str(i), prompt(8 + i % 9, seed=i), seeded(i, max_tokens=40 + i % 11)) for i in range(64)
    ]
    config = {"block_size": 8, "deterministic": True, "max_num_seqs": 64, "max_num_batched_tokens": 128}
    roomy = Engine.from_checkpoint(tiny_llama[0], EngineConfig(**config))
    demand = sum(-(-(r.num_tokens + r.params.max_tokens) // 8) * 8 for r in make())
    expected = run(roomy, make())
    assert roomy.stats.num_preemptions == 0
    tight = Engine.from_checkpoint(tiny_llama[0], EngineConfig(**config, kv_cache_tokens=demand // 4))
    assert run(tight, make()) == expected
    assert tight.stats.num_preemptions >= 50
    assert tight.scheduler.blocks.num_free == tight.scheduler.blocks.num_blocks


@pytest.mark.parametrize(
    ("ids", "max_tokens", "param", "words"),
    [
        ([], 1, "prompt", "empty"),
        ([5, 320], 1, "prompt", "outside"),
        ([-1], 1, "prompt", "outside"),
        ([5] * 256, 1, "prompt", "256 tokens"),
        ([5] * 250, 7, "max_tokens", "at most 6"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(engine, ids, max_tokens, param, words):
    with pytest.raises(InvalidRequest, match=words) as refusal:
        engine.add(Request("a", ids, SamplingParams(max_tokens=max_tokens)))
    assert refusal.value.param == param
    assert not engine.has_work


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kv_cache_tokens": 7, "block_size": 8}, "smaller than one block"),
        ({"max_model_len": 257}, "256 positions"),
        ({"max_model_len": 64, "kv_cache_tokens": 32}, "does not fit"),
    ],
)
def test_a_cache_that_cannot_hold_what_is_asked_is_refused(tiny_llama, config, words):
    with pytest.raises(ConfigError, match=words):
        Engine.from_checkpoint(tiny_llama[0], EngineConfig(**config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_one_clear_line(tiny_llama):
    with pytest.raises(ConfigError, match="no CUDA device"):
        Engine.from_checkpoint(tiny_llama[0], EngineConfig(device="cuda"))


def test_the_context_shrinks_to_a_small_cache(tiny_llama):
    assert small_pool(tiny_llama[0], tokens=100).max_model_len == 96


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_dtypes_generate_the_same_alone_and_in_a_batch_of_prompts(tiny_llama, dtype):
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(dtype=dtype, prefix_cache=False))
    first = run(engine, [Request("a", prompt(12), GREEDY)])["a"]
    assert len(first) == 24
    assert run(engine, [Request("a", prompt(12), GREEDY)])["a"] == first
