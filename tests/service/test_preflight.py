"""What is checked before anything is deployed, and what it says of the numbers that engines compute in."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from service.preflight import Verdict, check


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, "bf16"),
        ({"dtype": "fp32"}, "fp32"),
        ({"dtype": "int8"}, "int8"),
        ({"block_size": 12}, "fp32 on torch (block_size 12 is neither 2, 4, 8 nor a multiple of 16)"),
    ],
)
def test_the_check_tells_the_dtype_and_why_it_is_not_a_faster_one(
    tiny_model: Path, options: dict[str, object], verdict: str
) -> None:
    assert check(tiny_model, {"device": "cpu", **options}) == Verdict(verdict, "cpu")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization"),
        ({"cuda_graphs": True}, "cuda_graphs"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
    ],
)
def test_what_only_a_gpu_has_is_refused_on_a_cpu(tiny_model: Path, options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is for a GPU, and the engine runs on the CPU: .*; leave it out$"):
        check(tiny_model, {"device": "cpu", **options})
    check(tiny_model, {"device": "cpu", "cuda_graphs": False, "overlap": False})  # what a CPU does anyway
