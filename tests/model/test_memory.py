"""How large the cache of a device becomes, and what is said where something does not fit: on a made-up device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model.cache.packed import PackedPool, packed_block_bytes
from model.checkpoint import inspect_checkpoint, load_checkpoint
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.forward import TorchForward, TritonForward
from model.engine.graphs import partial_bytes, reserved_bytes
from model.engine.memory import check_weights_fit, expected_block_bytes, resolve_device, size_cache
from model.engine.worst_case import spare_bytes, step_peak, worst_prompts
from model.errors import ConfigError
from tests.model.native_scene import tiny

pytestmark = pytest.mark.fast

GIB = 2**30
CPU = torch.device("cpu")


class FakeMemory:
    """A device of 10 GiB, 4 of them taken, on which a step takes 1."""

    total = 10 * GIB

    def __init__(self, *, used: int = 4 * GIB, peak: int = GIB) -> None:
        self._used, self._peak = used, peak
        self.watched = 0

    def used(self) -> int:
        return self._used

    def measure_peak(self):
        self.watched += 1
        return SimpleNamespace(bytes=lambda: self._peak)


@pytest.fixture
def decoder(tiny_llama):
    return load_checkpoint(tiny_llama[0])


def test_the_cache_gets_what_weights_and_the_worst_step_leave_of_its_share(decoder):
    config = EngineConfig(gpu_memory_utilization=0.8)
    assert spare_bytes(decoder, config, TorchForward, FakeMemory()) == 3 * GIB


def test_graphs_are_reserved_for_where_they_are_captured(decoder):
    graphs = reserved_bytes(decoder.config, 2, 256, 16, 4)
    assert graphs > 2 * decoder.config.vocab_size * 4
    partial = partial_bytes(decoder.config, 2, 256)
    assert graphs > partial > 0
    for captured, reserved in ((None, partial + graphs), (True, partial + graphs), (False, partial)):
        config = EngineConfig(
            gpu_memory_utilization=0.8, cuda_graphs=captured, max_num_seqs=2, max_num_batched_tokens=2
        )
        assert spare_bytes(decoder, config, TritonForward, FakeMemory()) == 3 * GIB - reserved


def test_the_spare_memory_becomes_blocks_that_fit_into_it(decoder):
    model, config = decoder.config, EngineConfig(max_num_seqs=64, block_size=16)
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    assert TorchForward.block_bytes(decoder, config) == 16 * token
    assert size_cache(model, config, 16 * token, CPU, spare=100 * token) == (96, 6)
    assert size_cache(model, EngineConfig(kv_cache_tokens=100), 16 * token, CPU, spare=100 * token) == (96, 6)
    with pytest.raises(ConfigError, match=r"a cache of 101 tokens takes .* lower kv_cache_tokens to at most 100"):
        size_cache(model, EngineConfig(kv_cache_tokens=101), 16 * token, CPU, spare=100 * token)
    with pytest.raises(ConfigError, match="lower max_model_len to at most 96"):
        size_cache(model, EngineConfig(max_model_len=128), 16 * token, CPU, spare=100 * token)


@pytest.mark.parametrize(("block_size", "head_dim"), [(4, 10), (16, 64), (48, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_block_of_the_native_cache_is_counted_with_its_padding_and_its_scales(block_size, head_dim, dtype):
    model = tiny(num_kv_heads=2, head_dim=head_dim)
    pool = PackedPool(model, 5, block_size, dtype)
    assert (5 + 1) * packed_block_bytes(model, block_size, dtype) == pool.memory.nbytes


def test_an_int8_cache_holds_nearly_twice_the_tokens_of_one_in_bf16():
    model, config = tiny(head_dim=64), EngineConfig(dtype="bf16", max_num_seqs=512)
    sizes = [
        size_cache(model, kind, expected_block_bytes(model, kind, CPU), CPU, spare=2**24)[1]
        for kind in (config, replace(config, kv_cache_dtype="int8"))
    ]
    assert 1.9 < sizes[1] / sizes[0] < 2.0


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_what_is_expected_of_a_cache_before_loading_is_what_the_engine_has(tiny_llama, cache):
    config = EngineConfig(dtype="int8", device="cpu", kv_cache_dtype=cache)
    engine = Engine.from_checkpoint(tiny_llama[0], config)
    expected = expected_block_bytes(engine.model_config, config, CPU)
    assert engine.runner.compute.pool.memory.nbytes == (engine.scheduler.blocks.num_blocks + 1) * expected


def test_where_nothing_is_left_it_says_who_took_it_and_what_to_lower(decoder):
    with pytest.raises(ConfigError) as refused:
        spare_bytes(decoder, EngineConfig(), TorchForward, FakeMemory(used=9 * GIB))
    assert str(refused.value) == (
        "nothing is left for the cache: of 10.0 GiB the engine may use 90%; 9.0 GiB are taken, and a step of 512 "
        "tokens takes 1.0 GiB. Lower max_num_batched_tokens or max_num_seqs, raise gpu_memory_utilization, or load "
        "the weights in int8"
    )


def test_the_worst_step_fills_the_budget_with_as_many_requests_as_may_run(decoder, monkeypatch):
    seen = []
    forward = TorchForward.forward
    monkeypatch.setattr(TorchForward, "forward", lambda self, batch: seen.append(batch) or forward(self, batch))
    config = EngineConfig(max_num_seqs=5, max_num_batched_tokens=48)
    assert step_peak(decoder, config, TorchForward, FakeMemory(peak=77)) == 77
    (batch,) = seen
    assert len(batch.token_ids) == 48
    assert len(batch.sample_rows) == 5


def test_no_prompt_of_the_worst_step_is_longer_than_the_context(decoder):
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=4096, max_model_len=100)
    assert worst_prompts(decoder.config, config) == [99, 99]


@pytest.mark.parametrize(
    ("dtype", "free", "words"),
    [
        (
            "bf16",
            15,
            "take 16.0 GiB in bf16, and cpu has 15.0 GiB of memory free; they would fit in int8 \\(8.0 GiB\\)",
        ),
        ("fp32", 31, "they would fit in bf16 \\(16.0 GiB\\) or int8 \\(8.0 GiB\\)"),
        ("int8", 7, "cpu has 7.0 GiB of memory free; no dtype is small enough"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_would(dtype, free, words):
    with pytest.raises(ConfigError, match=words):
        check_weights_fit(8 * GIB, dtype, CPU, free * GIB)
    check_weights_fit(8 * GIB, dtype, CPU, (free + 1) * GIB)


def test_weights_are_counted_from_the_headers(tiny_llama):
    directory, theirs = tiny_llama
    assert inspect_checkpoint(directory).num_weights == sum(p.numel() for p in theirs.parameters())


def test_a_share_of_memory_lies_between_none_and_all():
    for share in (0.0, 1.1):
        with pytest.raises(ConfigError, match="gpu_memory_utilization must lie in"):
            EngineConfig(gpu_memory_utilization=share)


def test_the_cache_has_one_size():
    with pytest.raises(ConfigError, match="both say how large the cache is"):
        EngineConfig(gpu_memory_utilization=0.5, kv_cache_tokens=100)


def test_an_int8_cache_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="kv_cache_dtype 'int8' is for the CPU"):
        resolve_device(EngineConfig(kv_cache_dtype="int8"))
    assert resolve_device(EngineConfig(kv_cache_dtype="int8", device="cpu")) == CPU


@pytest.mark.parametrize(
    "options", [{"dtype": "fp32"}, {"kernels": "torch"}, {"kernels": "triton"}, {"device": "cuda"}]
)
def test_an_int8_cache_is_refused_beside_what_excludes_native_kernels(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"kv_cache_dtype 'int8' is for native kernels.*{name} is"):
        EngineConfig(kv_cache_dtype="int8", **options)
