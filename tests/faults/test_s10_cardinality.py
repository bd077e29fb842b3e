"""S10: whatever names clients make up, `/metrics` does not grow."""

from collections.abc import Callable

import pytest

from tests.faults.conftest import InProcess, scaled

pytestmark = pytest.mark.faults


def num_series(service: InProcess) -> int:
    return len(service.service.metrics.expose().splitlines())


async def test_made_up_names_make_no_series(in_process: Callable[..., InProcess]) -> None:
    """With the path as a label, each of them adds a line that Prometheus keeps for ever."""
    service = in_process()
    count = scaled(200, 10_000)

    async def round_of(i: int) -> None:
        name = f'"model\\":\\"made-up-{i}"'[1:-1].replace('\\"', "")
        await service.post("/v1/completions", b'{"prompt": "x", "max_tokens": 1, "model": "%s"}' % name.encode())
        await service.post("/v1/completions", b'{"prompt": "x", "max_tokens": 1, "user": "made-up-%d"}' % i)
        await service.post("/v1/completions", b'{"prompt": "x", "max_tokens": 1, "cache_salt": "made-up-%d"}' % i)
        await service.post(f"/made-up-{i}", b"{}")
        await service.post(f"/v1/models/made-up-{i}", b"{}")
        await service.post("/v1/completions", b"{}", {"x-request-id": f"made-up-{i}"})

    await round_of(0)
    before = num_series(service)
    for i in range(1, count):
        await round_of(i)
    assert num_series(service) == before
    assert "made-up" not in service.service.metrics.expose()
