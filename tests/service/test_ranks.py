"""What Ray sets aside for engines: GPUs that they do not share, and one node for the processes of each."""

import os
from collections.abc import Iterator

import pytest
import ray
import torch
from ray.util.placement_group import placement_group

from model.errors import ConfigError
from service.app import AppArgs, build
from service.preflight import check
from service.ranks import options_of

CUDA = {"device": "cuda", "dtype": "bf16", "kv_cache_tokens": 1024}


def engine_of(args: AppArgs):
    """The engine's deployment, as it is sent to Serve."""
    (engine, *_) = build(args)._bound_deployment.init_args
    return engine._bound_deployment


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """A Ray that was told of two GPUs; there is no CUDA here."""
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
class Somebody:
    def gpus(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def gpus_of(*options: dict) -> list[str]:
    """What actors with these options see, all alive at once."""
    actors = [Somebody.options(**one).remote() for one in options]
    return ray.get([actor.gpus.remote() for actor in actors], timeout=60)


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_two_engines_on_gpus_have_one_each() -> None:
    options = engine_of(AppArgs(device="cuda", replicas=2)).ray_actor_options
    assert sorted(gpus_of(options, options)) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_an_engine_on_the_cpu_takes_no_gpu_away() -> None:
    options = engine_of(AppArgs(device="cpu")).ray_actor_options
    on_gpu = engine_of(AppArgs(device="cuda")).ray_actor_options
    assert sorted(gpus_of(options, on_gpu, on_gpu)) == ["0", "1", "all"]


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_where_ray_has_gpus_an_engine_has_one_unless_it_was_told_otherwise() -> None:
    """Without one set aside, several would take the first GPU together."""
    engine = engine_of(AppArgs())
    assert engine.ray_actor_options["num_gpus"] == 1
    assert engine.init_args[2]["device"] == "cuda"


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_the_processes_of_an_engine_have_a_gpu_each_on_one_node() -> None:
    engine = engine_of(AppArgs(device="cuda", tensor_parallel=2))
    config = engine._replica_config
    group = placement_group(config.placement_group_bundles, config.placement_group_strategy)
    ray.get(group.ready(), timeout=60)
    leader = options_of(0, group)  # as Serve places it
    assert leader["num_gpus"] == engine.ray_actor_options["num_gpus"]
    assert sorted(gpus_of(leader, options_of(1, group))) == ["0", "1"]
    assert config.placement_group_strategy == "STRICT_PACK"


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("args", "surge"),
    [
        ({"device": "cuda", "replicas": 1}, 25),
        ({"device": "cuda", "replicas": 2}, 0),
        ({"device": "cuda", "tensor_parallel": 2}, 0),
        ({"device": "cpu", "replicas": 4}, 25),
    ],
)
def test_in_an_update_an_engine_comes_first_only_where_there_is_a_gpu_for_it(args: dict, surge: int) -> None:
    """It would wait for ever for the GPU of the one that waits for it."""
    assert engine_of(AppArgs(**args))._deployment_config.max_surge_percent == surge


def test_without_processors_set_aside_an_engine_of_several_processes_has_a_place_all_the_same() -> None:
    config = engine_of(AppArgs(device="cpu", tensor_parallel=2))._replica_config
    assert config.placement_group_bundles == [{"CPU": 0.001}] * 2


def test_the_cores_are_shared_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.machine.cores", lambda: 16)
    shared = AppArgs(replicas=2, tensor_parallel=2)
    assert (shared.cores, shared.engine_options["processes_per_machine"]) == (4, 4)


def test_a_machine_holds_no_more_processes_than_find_their_processors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.machine.cores", lambda: 16)
    shared = [AppArgs(replicas=replicas, replica_cpus=4).processes_per_machine for replicas in (3, 8)]
    assert shared == [3, 4]
    assert AppArgs(replicas=8, replica_cpus=32).processes_per_machine == 1, "on another machine, then"


@pytest.mark.parametrize(
    ("options", "num_ranks", "words"),
    [
        ({}, 3, r"num_heads \(4\) cannot be split over 3 processes"),
        ({"dtype": "int8"}, 2, "int8 weights and deterministic sums are not split"),
        ({"deterministic": True}, 2, "int8 weights and deterministic sums are not split"),
    ],
    ids=["heads", "int8", "deterministic"],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(tiny_model, options, num_ranks, words) -> None:
    with pytest.raises(ConfigError, match=words):
        check(tiny_model, {"device": "cpu", **options}, num_ranks)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("num_ranks", "max_ranks"), [(1, 2), (2, 2)])
def test_as_many_processes_as_gpus_are_taken(tiny_model, num_ranks: int, max_ranks: int) -> None:
    assert check(tiny_model, CUDA, num_ranks, max_ranks).device == "cuda"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("num_ranks", "max_ranks"), [(1, 3), (2, 4)])
def test_more_processes_than_gpus_are_refused(tiny_model, num_ranks: int, max_ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"{max_ranks} GPUs are needed.* there are 2: fewer replicas"):
        check(tiny_model, CUDA, num_ranks, max_ranks)


@pytest.mark.usefixtures("cuda")
def test_a_split_model_on_gpus_wants_the_size_of_its_cache(tiny_model) -> None:
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        check(tiny_model, {"device": "cuda"}, 2, 2)
