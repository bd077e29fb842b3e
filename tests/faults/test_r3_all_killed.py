"""R3: the next replica is killed too, while it takes over; then all, and none comes back.

Without a bound a stream would wait for a replica that never comes, since Serve never stops starting one. Without an
error of its own, its client could not tell the end of the text from the end of the service.
"""

import asyncio
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import STORYTELLER
from tests.faults.conftest import FULL
from tests.faults.survivors import same, tell_all, until, until_engines
from tests.service.conftest import Running, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS, TOKENS = 8, 600
HANGS_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model, to be broken."""
    return Path(shutil.copytree(STORYTELLER, tmp_path_factory.mktemp("killed") / "storyteller"))


@pytest.fixture(scope="module")
def trio(model: Path) -> Iterator[Running]:
    running = start(model, "--replicas", "3", "--kv-cache-tokens", "8192", "--dtype", "bf16")
    yield running
    stop(running)


async def test_streams_outlive_a_second_death_while_they_move(trio: Running) -> None:
    undisturbed = await tell_all(trio, STREAMS, TOKENS)
    resumes = trio.metrics()["attendant_stream_resumes_total"]

    async def kill_two() -> None:
        first, *_ = await asyncio.to_thread(trio.engines_at_work)
        first.send_signal(signal.SIGKILL)
        await until(lambda: trio.metrics()["attendant_stream_resumes_total"] > resumes, 20)
        second, *_ = await asyncio.to_thread(trio.engines_at_work)
        second.send_signal(signal.SIGKILL)

    told = await tell_all(trio, STREAMS, TOKENS, kill_two)
    assert [one.error for one in told] == [None] * STREAMS
    assert same(told, undisturbed) == STREAMS


async def test_what_nobody_can_go_on_with_ends_with_an_error_and_soon(trio: Running, model: Path) -> None:
    await until_engines(trio, 3)
    killed_at = 0.0

    async def kill_for_good() -> None:
        nonlocal killed_at
        (model / "config.json").write_text("{")
        killed_at = time.perf_counter()
        for engine in trio.engine_processes():
            engine.send_signal(signal.SIGKILL)

    told = await tell_all(trio, STREAMS, 400, kill_for_good)
    took = time.perf_counter() - killed_at
    assert all(one.error is not None and "no engine runs" in one.error for one in told)
    assert all(one.is_done for one in told)

    async with httpx.AsyncClient(base_url=trio.url, timeout=60) as client:
        asked_at = time.perf_counter()
        answer = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4})
        waited = time.perf_counter() - asked_at
    print(f"streams ended after {took:.2f} s, a new request after {waited:.2f} s: {told[0].error}")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["retry-after"]) >= 1
    if FULL:
        assert took <= HANGS_S
        assert waited <= HANGS_S
