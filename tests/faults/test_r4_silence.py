"""R4: a replica stands still for ten seconds (SIGSTOP). Its streams go on elsewhere, and nobody hears what it says when
it wakes.

Without a heartbeat the streams hang until it wakes: their pause is the whole ten seconds. Without the fence, its late
tokens are told twice.
"""

import asyncio
import signal

import psutil
import pytest

from tests.faults.conftest import scaled
from tests.faults.survivors import pause_at, same, tell_all, until, until_engines
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS, TOKENS = 8, 600
ASLEEP_S = 10.0


async def num_resumes(running: Running) -> float:
    """Streams moved so far, over all replicas."""
    return (await asyncio.to_thread(running.metrics))["attendant_stream_resumes_total"]


async def test_streams_of_a_replica_that_stands_still_go_on_elsewhere(fleet: Running) -> None:
    undisturbed = await tell_all(fleet, STREAMS, TOKENS)
    for _ in range(scaled(1, 5)):
        await until_engines(fleet, 2)
        victim: psutil.Process
        resumes = await num_resumes(fleet)
        awake = asyncio.Event()

        async def stand_still(awake=awake) -> None:
            nonlocal victim
            victim, *_ = await asyncio.to_thread(fleet.engines_at_work)
            victim.send_signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(ASLEEP_S, lambda: (victim.send_signal(signal.SIGCONT), awake.set()))

        told = await tell_all(fleet, STREAMS, TOKENS, stand_still)
        await awake.wait()
        moved = await num_resumes(fleet) - resumes
        print(f"{same(told, undisturbed)} of {STREAMS} identical, {moved:g} moved, pause {pause_at(told, 1):.2f} s")
        assert same(told, undisturbed) == STREAMS
        assert moved > 0
        assert pause_at(told, 1) < ASLEEP_S, "they waited for it to wake"
        await until(lambda: fleet.metrics()["attendant_num_requests_running"] == 0, 20)
        assert victim.is_running(), "it came back, and was not replaced"


async def test_a_service_whose_only_other_replica_stands_still_answers_new_requests(fleet: Running) -> None:
    await until_engines(fleet, 2)
    victim, *_ = fleet.engine_processes()
    victim.send_signal(signal.SIGSTOP)
    try:
        told = await tell_all(fleet, 6, 8)
    finally:
        victim.send_signal(signal.SIGCONT)
    assert [one.reason for one in told] == ["length"] * 6
