"""Decode steps by captured graphs, with a capture that runs the same function again on the same memory."""

import logging
import random

import pytest
import torch

from model.config import EngineConfig
from model.engine import forward
from model.engine.engine import Engine
from model.engine.graphs import DecodeGraphs, buckets, capture_for
from model.engine.request import Request
from model.engine.transfer import PinnedTransfers
from model.sampling.params import SamplingParams
from tests.conftest import write_llama
from tests.late_copies import LateCopies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Recorder:
    """A capture that counts, and replays by running again."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run):
        run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def graphs_of(largest: int) -> tuple[DecodeGraphs, list[int]]:
    sizes: list[int] = []
    return DecodeGraphs(largest, sizes.append, Recorder()), sizes


@pytest.mark.fast
@pytest.mark.parametrize("largest", [1, 2, 3, 7, 8, 64, 100, 256, 300, 1000])
def test_every_batch_size_has_a_bucket_and_small_ones_little_padding(largest):
    sizes = buckets(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    assert sizes[0] == 1
    for size in range(1, largest + 1):
        bucket = next(bucket for bucket in sizes if bucket >= size)
        assert bucket - size <= max(7, size // 3)


@pytest.mark.fast
def test_the_largest_is_captured_first_and_each_once(caplog):
    with caplog.at_level(logging.INFO, "model.engine.graphs"):
        _, sizes = graphs_of(16)
    assert sizes == [16, 8, 4, 2, 1]
    assert "captured 5 of 5 decode graphs" in caplog.text


@pytest.mark.fast
def test_a_step_is_computed_in_the_smallest_bucket_that_holds_it():
    graphs, sizes = graphs_of(16)
    sizes.clear()
    for size in (3, 8, 1, 9, 16):
        graphs.of(size)()
    assert sizes == [4, 8, 1, 16, 16]


@pytest.mark.fast
def test_without_a_gpu_nothing_is_captured():
    assert capture_for(torch.device("cpu")) is None


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A model of one layer: the interpreter takes its time for each."""
    directory = tmp_path_factory.mktemp("shallow")
    write_llama(directory, num_hidden_layers=1)
    return directory


@pytest.mark.slow
def test_an_engine_says_the_same_by_graphs_across_prefix_hits_siblings_and_preemption(shallow, monkeypatch):
    """Three siblings and another behind one prefix, in a cache too small for all of them."""
    recorder = Recorder()
    shared = list(range(40, 57))
    outputs = {}
    monkeypatch.setattr(forward, "capture_for", lambda device: recorder)
    for kernels in ("triton", "torch"):
        config = EngineConfig(
            dtype="fp32", device=DEVICE.type, block_size=8, kv_cache_tokens=48, max_num_seqs=4,
            max_num_batched_tokens=32, kernels=kernels, overlap=True,
        )  # fmt: skip
        engine = Engine.from_checkpoint(shallow, config)
        if DEVICE.type == "cpu":
            engine.runner.transfers = PinnedTransfers(LateCopies())
        params = [SamplingParams(max_tokens=10, temperature=0.7, seed=seed, ignore_eos=True) for seed in range(4)]
        leader = Request("0", shared, params[0])
        requests = [leader, *(Request(str(i), shared, params[i], leader=leader) for i in (1, 2))]
        requests.append(Request("3", [*shared[:9], 5], params[3]))
        said = outputs[kernels] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                said[output.request_id] += output.token_ids
            engine.check_integrity()
        assert engine.stats.prefix_hits > 0
        assert engine.stats.num_preemptions > 0
        keys, values = engine.runner.compute.pool.keys, engine.runner.compute.pool.values
        assert not keys[:, :8].any()  # the null block
        assert not values[:, :8].any()
    assert outputs["triton"] == outputs["torch"]
    assert recorder.captured == 3
    assert recorder.replayed > 5


# What may be asked for: the first are drawn inside of a graph, the others from logits that it does not know.
PLAIN = [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05, "top_k": 40}]
ADJUSTED = [{"presence_penalty": 1.0}, {"repetition_penalty": 1.3}, {"logit_bias": {7: 4.0}}, {"min_tokens": 4}]


def said(engine: Engine, asks: list[dict[str, object]]) -> dict[str, list[int]]:
    """A request joins at every second step; the third leaves after a few."""
    rng = random.Random(len(asks))
    requests = [
        Request(str(i), rng.choices(range(3, 300), k=3 + 2 * i), SamplingParams(max_tokens=9, seed=i, **ask))
        for i, ask in enumerate(asks)
    ]
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    step = 0
    while requests or engine.has_work:
        if requests and step % 2 == 0:
            engine.add(requests.pop(0))
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        if len(outputs["2"]) >= 3:
            engine.abort("2")
        engine.check_integrity()
        step += 1
    outputs["2"] = outputs["2"][:3]
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_what_graphs_draw_is_what_the_sampler_draws_whatever_is_asked_for(shallow, monkeypatch, seed):
    """Against torch's kernels and the sampler on the host."""
    rng = random.Random(seed)
    asks = [*rng.sample(PLAIN, 4), *rng.sample(ADJUSTED, 2)]
    rng.shuffle(asks)
    asks[3] = asks[3] | {"logprobs": 1}
    options = {"dtype": "fp32", "device": DEVICE.type, "block_size": 8, "kv_cache_tokens": 400, "max_num_seqs": 4}
    expected = said(Engine.from_checkpoint(shallow, EngineConfig(kernels="torch", overlap=False, **options)), asks)

    monkeypatch.setattr(forward, "capture_for", lambda device: Recorder())
    engine = Engine.from_checkpoint(shallow, EngineConfig(kernels="triton", overlap=True, **options))
    where, sample = [], engine.runner.sample
    in_graph = engine.runner.compute.decodes.outputs.token_ids.data_ptr()

    def sampled(*args):
        flight = sample(*args)
        where.append(flight.drawn is not None and flight.drawn.token_ids.data_ptr() == in_graph)
        return flight

    monkeypatch.setattr(engine.runner, "sample", sampled)
    assert said(engine, asks) == expected
    assert min(where.count(True), where.count(False)) >= 3
