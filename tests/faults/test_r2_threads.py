"""R2: the thread of an engine dies, or sticks in a step, and its process lives on: nothing ends by itself.

Without a look at the thread, its streams hang for ever: the process answers, and its channel beats. Where only Serve's
health check looks, they hang until Serve has given the replica up.
"""

import asyncio
import time

import psutil
import pytest

from service.step_watch import LEAST_S
from tests.faults.conftest import FULL, scaled
from tests.faults.sabotage import DIES, STICKS
from tests.faults.survivors import Told, pause_at, same, tell_all, until, until_engines
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS, TOKENS = 24, 256
NOTICED_S, PAUSE_S = 1.0, 2.0


async def strike(fleet: Running, number: int) -> tuple[list[Told], float]:
    """Streams under which one engine fails, and the seconds until the first has moved. Returns when it is replaced."""
    await until_engines(fleet, 2)
    victim: psutil.Process
    resumes, noticed = fleet.metrics()["attendant_stream_resumes_total"], 0.0

    async def fail() -> None:
        nonlocal victim, noticed
        victim, *_ = await asyncio.to_thread(fleet.engines_at_work)
        began = time.perf_counter()
        victim.send_signal(number)
        await until(lambda: fleet.metrics()["attendant_stream_resumes_total"] > resumes, 60)
        noticed = time.perf_counter() - began

    told = await tell_all(fleet, STREAMS, TOKENS, fail)
    await asyncio.to_thread(psutil.wait_procs, [victim], 60)
    assert not victim.is_running(), "nobody replaced it"
    return told, noticed


def report(told: list[Told], undisturbed: list[Told], noticed: float) -> None:
    num_same, pause = same(told, undisturbed), pause_at(told, 0.99)
    print(f"{num_same} of {STREAMS} identical, the first moved after {noticed:.2f} s, pause p99 {pause:.2f} s")


async def test_streams_of_an_engine_whose_thread_dies_are_what_they_would_have_been(fleet: Running) -> None:
    undisturbed = await tell_all(fleet, STREAMS, TOKENS)
    for _ in range(scaled(1, 3)):
        told, noticed = await strike(fleet, DIES)
        report(told, undisturbed, noticed)
        assert same(told, undisturbed) == STREAMS
        if FULL:
            assert noticed <= NOTICED_S
            assert pause_at(told, 0.99) <= PAUSE_S


async def test_streams_of_an_engine_that_sticks_in_a_step_are_what_they_would_have_been(fleet: Running) -> None:
    undisturbed = await tell_all(fleet, STREAMS, TOKENS)
    told, noticed = await strike(fleet, STICKS)
    report(told, undisturbed, noticed)
    assert same(told, undisturbed) == STREAMS
    if FULL:
        assert noticed <= 2 * LEAST_S
