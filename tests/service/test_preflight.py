"""What is checked before anything is deployed, and what it says of the numbers that engines compute in."""

from pathlib import Path

import pytest

from service.preflight import check


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
    assert check(tiny_model, {"device": "cpu", **options}) == verdict
