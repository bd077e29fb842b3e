"""R3: the next replica is killed too, while it takes over; then all, and none comes back.

Without a bound a stream would wait for a replica that never comes. Without an error of its own, its client could not
tell the end of the text from the end of the service.
"""

import shutil
import signal
import time
from pathlib import Path

import pytest

from service.dispatch import RESUME_TIMEOUT_S
from tests.conftest import STORYTELLER
from tests.faults.survivors import same, tell_all, until
from tests.service.conftest import Running, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]


async def test_streams_outlive_the_death_of_every_replica(fleet: Running) -> None:
    await until(lambda: len(fleet.engine_processes()) == 2, 60)
    undisturbed = await tell_all(fleet, 8, 200)
    resumes = fleet.metrics()["attendant_stream_resumes_total"]

    async def kill_all() -> None:
        first, second = fleet.engine_processes()
        first.send_signal(signal.SIGKILL)
        await until(lambda: fleet.metrics()["attendant_stream_resumes_total"] > resumes, 20)
        second.send_signal(signal.SIGKILL)

    told = await tell_all(fleet, 8, 200, kill_all)
    assert [one.error for one in told] == [None] * 8
    assert same(told, undisturbed) == 8


async def test_a_stream_that_nobody_can_go_on_with_ends_with_an_error_and_soon(tmp_path: Path) -> None:
    model = tmp_path / "storyteller"
    shutil.copytree(STORYTELLER, model)
    running = start(model, "--kv-cache-tokens", "8192", "--dtype", "bf16")
    killed_at = 0.0

    async def kill_for_good() -> None:
        nonlocal killed_at
        (model / "config.json").write_text("{")
        killed_at = time.perf_counter()
        for engine in running.engine_processes():
            engine.send_signal(signal.SIGKILL)

    try:
        told = await tell_all(running, 4, 400, kill_for_good)
        took = time.perf_counter() - killed_at
        print(f"after {took:.1f} s: {told[0].error}")
    finally:
        stop(running)
    assert all(one.error is not None and "engine" in one.error for one in told)
    assert all(one.is_done for one in told)
    assert took < RESUME_TIMEOUT_S + 5
